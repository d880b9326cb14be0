"""Compare policies on the same prefixes: judge win rates, safety, diversity and repetition, better or worse as found.

    python tools/compare.py --arm base=runs/demo/base-hf --arm ntp=runs/demo/ntp-hf --arm sip=runs/demo/sip-hf \\
        --tokenizer-model data/demo/tokenizer --held-out data/demo/held_out.jsonl \\
        --unsafe data/demo/unsafe_prefixes.jsonl --classifiers-dir data/demo/classifiers \\
        --judge-url http://127.0.0.1:8100/v1 --trained-with judge profanity-check --out runs/demo/compare

The first arm is the base. Every arm writes greedily and equally long. --trained-with names what scored the training,
because another reading of the same weights is not another judge. Several judges, by --judge-set as in a run:

    ... --judge-set quality-b.kind=quality quality-b.url=http://127.0.0.1:8200/v1 reward.weight=1 reward.url=...

Keys come from JUDGE_API_KEY for the hosts of --judge-url, or from NAME_JUDGE_API_KEY for a single judge.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from megatron_sip.config.groups import Config
from megatron_sip.config.judge_set import CHAT_KINDS, active_judges
from megatron_sip.config.numbers import whole_number
from megatron_sip.config.validate_judges import vote_problems
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.evaluation.arms import Arm, load_policy, parse_arms, write_greedily
from megatron_sip.evaluation.compare import Comparison, Reader, compare_arms
from megatron_sip.evaluation.judge_flags import add_judge_flags, judge_of_flags
from megatron_sip.evaluation.progress import Steps
from megatron_sip.evaluation.prompts import EvaluationPrefix, held_out_prefixes, unsafe_prefixes
from megatron_sip.evaluation.report import Report, make_folder, print_report, write_report
from megatron_sip.evaluation.safety import Classifier, compare_safety
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.toxicity import load_profanity_check, load_toxic_bilstm

CLASSIFIERS = ("profanity-check", "toxic-bilstm")
WIDTH_OF_A_FILE = 160


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arm", action="append", required=True, metavar="NAME=FOLDER", help="a Hugging Face folder; the first is base")
    add("--tokenizer-model", required=True, help="tokenizer of all arms")
    add("--held-out", type=Path, required=True, help="JSONL of held-out documents")
    add("--unsafe", type=Path, help="JSONL of unsafe prefixes; without it safety is not measured")
    add("--classifiers-dir", type=Path, help="folder that holds toxic-bilstm/, as tools/get_demo_data.py makes it")
    add_judge_flags(parser, judge_set="further judges, as in a run")
    add("--no-likelihood", dest="likelihood", action="store_false", help="leave out each text's likelihood")
    add("--allow-insecure-judge", action="store_true", help="send a key over plain http to another host")
    add(
        "--trained-with",
        nargs="+",
        required=True,
        choices=["none", "judge", *CLASSIFIERS],
        help="what scored the training of any arm; judge: the model behind --judge-url",
    )
    add("--trained-with-model", nargs="+", default=[], help="names of further models that scored the training")
    add("--num-prefixes", type=whole_number(1), default=100, help="held-out prefixes (default %(default)s)")
    add("--num-unsafe-prefixes", type=whole_number(1), default=200, help="unsafe prefixes (default %(default)s)")
    add("--prefix-length", type=whole_number(1), default=96, help="tokens of a held-out prefix, longest unsafe one")
    add("--suffix-length", type=whole_number(1), default=128, help="tokens that every arm writes")
    add("--batch-size", type=whole_number(1), default=50, help="prefixes written at once")
    add("--num-threads", type=whole_number(1), default=1, help="CPU threads while writing")
    add("--seed", type=whole_number(0), default=1234, help="seed of the bootstrap")
    add("--out", type=Path, required=True, help="folder for report.json and report.md")
    return parser


def judge_config(args: argparse.Namespace) -> Config:
    """Settings of a quality judge, of a likelihood judge if asked for, and of what --judge-set adds.

    ConfigError for an entry that cannot be read, and for votes on a question that is always answered the same.
    """
    config = Config(
        judge=judge_of_flags(
            args,
            allow_insecure_judge=args.allow_insecure_judge,
            quality_weight=1.0,
            likelihood_weight=1.0 if args.likelihood else 0.0,
        )
    )
    problems = list(vote_problems(active_judges(config.judge), config.judge))
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def write_all(
    arms: Sequence[Arm], groups: Sequence[Sequence[EvaluationPrefix]], tokenizer: Tokenizer, args: argparse.Namespace
) -> list[dict[str, list[str]]]:
    """For each group of prefixes, the texts of every arm in the order of the prefixes."""
    texts: list[dict[str, list[str]]] = [{} for _ in groups]
    for arm in arms:
        policy = load_policy(arm.folder, tokenizer.vocab_size)
        steps = Steps(f"{arm.name} writes", sum(len(group) for group in groups))
        for group, store in zip(groups, texts, strict=True):
            rows = write_greedily(
                policy,
                [prefix.tokens for prefix in group],
                args.suffix_length,
                tokenizer.eod,
                vocab_size=tokenizer.vocab_size,
                batch_size=args.batch_size,
                tick=steps.add,
            )
            store[arm.name] = [
                tokenizer.candidate_text(prefix.tokens, row) for prefix, row in zip(group, rows, strict=True)
            ]
    return texts


def readers_of(config: Config, models: dict[str, str]) -> list[Reader]:
    """How each judge of the configuration is reported; `models` are the names of their models."""
    readers = []
    for settings in active_judges(config.judge):
        name, model = settings.name, models[settings.name]
        if settings.kind == "likelihood":
            label = "log-likelihood a token, repetition counted off" + ("" if name == settings.kind else f" ({name})")
            readers.append(Reader(name, label, model, pairwise=False, scale="log"))
        else:
            how = {"logit": "one-token verdicts", "generate": "written verdicts"}[settings.reading]
            of_kind = name if name == settings.kind else f"{name} ({settings.kind})"
            votes = settings.votes if settings.kind in CHAT_KINDS else 1
            how += f", {votes} votes" if votes > 1 else ""
            label = f"{name} ({how})" if settings.kind in CHAT_KINDS else of_kind
            readers.append(Reader(name, label, model, pairwise=settings.pairwise, votes=votes))
    return readers


def judge_quality(
    services: PreferenceServices,
    prefixes: Sequence[EvaluationPrefix],
    texts: dict[str, list[str]],
    base: str,
    args: argparse.Namespace,
) -> Comparison:
    """Win rates against the base and the pointwise scores of every arm's text, by each judge."""
    readers = readers_of(judge_config(args), {name: source.model for name, source in services.sources().items()})
    steps = Steps("the judge compares", len(prefixes))
    return compare_arms(
        [prefix.text for prefix in prefixes],
        texts,
        readers,
        lambda pools, questions: services.submit_answers(pools, questions).result(),
        base=base,
        originals=[prefix.original for prefix in prefixes],
        seed=args.seed,
        on_progress=lambda done, _all: steps.at(done),
    )


def training_weights(args: argparse.Namespace, models: dict[str, str]) -> tuple[str, ...]:
    """Names of the models that scored the training, as the report spells them."""
    shared = {models[s.name] for s in active_judges(judge_config(args).judge) if s.served and "url" not in s.own}
    named = {name for name in args.trained_with if name in CLASSIFIERS} | set(args.trained_with_model)
    return tuple(sorted(named | (shared if "judge" in args.trained_with else set())))


def load_classifiers(args: argparse.Namespace) -> list[Classifier]:
    """Both local classifiers, or the one that needs no files. Raises ConfigError where files are missing."""
    loaded = [Classifier(CLASSIFIERS[0], CLASSIFIERS[0], load_profanity_check())]
    if args.classifiers_dir:
        if not (args.classifiers_dir / CLASSIFIERS[1]).is_dir():
            raise ConfigError(
                f"--classifiers-dir {args.classifiers_dir} holds no {CLASSIFIERS[1]}/; `python tools/get_demo_data.py` "
                "makes it, or leave the flag out"
            )
        loaded.append(
            Classifier(CLASSIFIERS[1], CLASSIFIERS[1], load_toxic_bilstm(args.classifiers_dir / CLASSIFIERS[1]))
        )
    return loaded


def compare(args: argparse.Namespace) -> Report:
    """The whole comparison. Raises SipError for what the user can mend."""
    arms = parse_arms(args.arm)
    # What can be wrong shows before minutes of writing and judging, not after.
    classifiers = load_classifiers(args) if args.unsafe else []
    tokenizer = Tokenizer(args.tokenizer_model)
    held_out = held_out_prefixes(args.held_out, tokenizer, args.num_prefixes, args.prefix_length, args.suffix_length)
    unsafe = (
        unsafe_prefixes(args.unsafe, tokenizer, args.num_unsafe_prefixes, args.prefix_length) if args.unsafe else []
    )
    with PreferenceServices(judge_config(args)) as services:
        make_folder(args.out)
        texts, unsafe_texts = write_all(arms, [held_out, unsafe], tokenizer, args)
        quality = judge_quality(services, held_out, texts, arms[0].name, args)
        trained = training_weights(args, {name: source.model for name, source in services.sources().items()})
    return Report(
        quality=quality,
        safety=compare_safety(unsafe_texts, classifiers, base=arms[0].name, seed=args.seed) if unsafe else None,
        training_weights=trained,
        notes=(
            f"Greedy continuations of {args.suffix_length} tokens without end-of-document; held-out prefixes are the "
            f"first {args.prefix_length} tokens of {len(held_out)} documents that no arm was trained on.",
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.num_threads)
    # A log or a pipe has no width of its own, and eighty columns would fold every number.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH_OF_A_FILE)
    try:
        report = compare(args)
        print_report(report, console)  # first: a full disk must not take the numbers with it
        page = write_report(report, args.out)[1]
    except SipError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    console.print(f"written to {page}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
