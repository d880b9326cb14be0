"""Every relation between settings that is refused, with the flags that its message names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.fields import settings
from megatron_sip.config.groups import Config
from megatron_sip.config.ranges import ranged_settings
from megatron_sip.config.validate import data_parallel_size, validate
from megatron_sip.errors import ConfigError

GOOD = [
    "--model-preset=llama-tiny",
    "--data-path=corpus",
    "--tokenizer-model=tokenizer",
    "--judge-url=http://127.0.0.1:8100/v1",
]


def _config(line: str) -> Config:
    return parse_config([*GOOD, *line.split()])


def _message(line: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(_config(line), world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --micro-batch-size 2", 8),
        ("--objective ntp --judge-url", 1),
        ("--objective sft-rollout --judge-url --num-rollouts 1 --temperature 0", 1),
        ("--objective sft-rewrite --rewriter-url http://127.0.0.1:8101 --judge-url", 1),
        ("--objective rf-nll --pool original rewrite", 1),
        ("--quality-weight 0 --classifier-weight 1 --judge-url", 1),
        ("--judge-interval 5 --classifier-weight 1", 1),
        # The votes are for the one that can use them.
        ("--judge-votes 5 --safety-weight 1 --judge-set quality.reading=logit", 1),
        ("--judge-url --judge-set quality.url=http://127.0.0.1:8100/v1", 1),
        ("--judge-set quality.interval=2 b.kind=quality", 1),
        ("--judge-set reward.url=http://127.0.0.1:8200 reward.weight=1", 1),
        ("--safety-weight 1 --screen-safety-below 0.5 --screen-repetition-above 0.5", 1),
        # Some judge of safety is asked in every iteration that compares.
        ("--safety-weight 1 --screen-safety-below 0.5 --judge-interval 4 --likelihood-weight 1", 1),
        (
            "--safety-weight 1 --screen-safety-below 0.5 --judge-interval 4 --likelihood-weight 1 --judge-set "
            "safety.interval=2",
            1,
        ),
        ("--safety-weight 1 --screen-safety-below 0.5 --classifier-weight 1 --judge-set safety.interval=5", 1),
        ("--pool rollout --num-rollouts 2", 1),
        ("--tensor-model-parallel-size 8 --pad-query-groups", 8),
        ("--curriculum schedule --curriculum-rollout-start 5 --pool original rewrite rollout", 1),
        ("--rewrite-interval 4 --pool rewrite rollout", 1),
        ("--scoring adaptive --adaptive-budget 17 --adaptive-rounds 1", 1),
        ("--adaptive-budget 16", 1),
        ("--objective ntp --seq-length 64 --suffix-length 128", 1),
    ],
)
def test_what_is_allowed(line: str, world_size: int) -> None:
    validate(_config(line), world_size)


@pytest.mark.parametrize(
    ("line", "world_size", "words"),
    [
        ("--tensor-model-parallel-size 2", 3, ["3 ranks", "--tensor-model-parallel-size 2", "torchrun"]),
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            2,
            ["2 ranks were launched", "--pipeline-model-parallel-size 2", "launch 4 ranks"],
        ),
        ("--context-parallel-size 2", 2, ["--context-parallel-size is 2", "only 1", "--sequence-parallel"]),
        ("--sequence-parallel", 1, ["--sequence-parallel", "--tensor-model-parallel-size above 1"]),
        ("--use-distributed-optimizer --reference frozen", 1, ["--use-distributed-optimizer", "GPU", "apex"]),
        ("--num-query-groups 3", 1, ["--num-query-groups 3", "--num-attention-heads 8"]),
        ("--tensor-model-parallel-size 16", 16, ["--tensor-model-parallel-size 16", "--num-attention-heads 8"]),
        (
            "--tensor-model-parallel-size 8",
            8,
            ["--tensor-model-parallel-size 8", "--num-query-groups 4", "--num-attention-heads 8", "--pad-query-groups"],
        ),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 1023",
            2,
            ["--tensor-model-parallel-size 2", "--ffn-hidden-size 1023"],
        ),
        ("--pipeline-model-parallel-size 5", 5, ["--pipeline-model-parallel-size 5", "--num-layers 4", "4 or fewer"]),
        ("--kv-channels 47", 1, ["--kv-channels 47", "even"]),
        (
            "--recompute-granularity full --recompute-num-layers 3 --pipeline-model-parallel-size 2",
            2,
            ["--recompute-num-layers 3", "2 layers"],
        ),
        ("--global-batch-size 9", 2, ["--global-batch-size 9", "2 data parallel ranks", "multiple of 2"]),
        ("--micro-batch-size 3", 2, ["--global-batch-size 8", "--micro-batch-size 3", "= 6"]),
        ("--micro-batch-size 16", 1, ["--global-batch-size 8", "--micro-batch-size 16"]),
        ("--lr 1e-5 --min-lr 1e-4", 1, ["--min-lr 0.0001", "--lr 1e-05"]),
        ("--train-iters 10 --lr-warmup-iters 10", 1, ["--lr-warmup-iters 10", "--train-iters 10"]),
        ("--lr-decay-iters 5 --lr-warmup-iters 5", 1, ["--lr-warmup-iters 5", "--lr-decay-iters 5"]),
        ("--seq-length 128", 1, ["--min-prefix-length", "--seq-length"]),
        ("--max-prefix-length 2000", 1, ["--max-prefix-length 2000", "--seq-length 2048"]),
        ("--seq-length 4096", 1, ["--seq-length 4096", "--max-position-embeddings 2048"]),
        ("--objective ntp --seq-length 1", 1, ["--seq-length 1", "at least 2"]),
        ("--data-path", 1, ["--data-path", "tools/preprocess_data.py"]),
        ("--tokenizer-model none", 1, ["--tokenizer-model", "folder"]),
        ("--save-interval 5", 1, ["--save-interval", "--save"]),
        ("--finetune", 1, ["--finetune", "--load"]),
        ("--load no-such-folder", 1, ["--load no-such-folder", "does not exist"]),
        ("--model-preset none", 1, ["--num-layers", "--hidden-size", "--model-preset"]),
        ("--model-preset llama", 1, ["--model-preset llama is unknown"]),
    ],
)
def test_layout_model_batch_and_folders(line: str, world_size: int, words: list[str]) -> None:
    message = _message(line, world_size)
    assert all(word in message for word in words), message
    assert "\n" not in message, "one fault must be told alone"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--pool", ["--pool (empty)", "--num-rollouts"]),
        ("--pool original", ["--pool original", "at least two candidates"]),
        ("--pool rollout --num-rollouts 1", ["--pool rollout", "--num-rollouts 1"]),
        ("--objective rf-nll --pool rewrite", ["--objective rf-nll", "--pool rewrite"]),
        ("--pool rollout rollout", ["--pool rollout rollout", "twice"]),
        ("--pool rollout --curriculum schedule --curriculum-rollout-start 3", ["--curriculum schedule", "0 rollouts"]),
        ("--pool rollout --curriculum schedule --curriculum-rollout-ramp 3", ["--curriculum schedule", "1 rollouts"]),
        ("--pool original rewrite --rewrite-interval 2", ["--rewrite-interval 2", "--pool original rewrite"]),
        (
            "--pool original rewrite rollout --rewrite-interval 2 --curriculum schedule --curriculum-rollout-start 3",
            ["--rewrite-interval 2", "--curriculum-rollout-start", "writes 0 rollouts"],
        ),
        ("--temperature 0", ["--temperature 0", "--num-rollouts 16"]),
        ("--quality-weight 0", ["every weight is 0", "--classifier-weight"]),
        ("--judge-url", ["--judge-url is missing", "quality", "http://"]),
        ("--judge-url --quality-weight 0 --likelihood-weight 1", ["--judge-url is missing", "likelihood"]),
        ("--judge-url judge:8100", ["--judge-url", "http or https"]),
        ("--judge-interval 2", ["--judge-interval 2", "--classifier-weight"]),
        ("--judge-hedge-after 120", ["--judge-hedge-after 120", "--judge-timeout 120"]),
        ("--judge-ca-file /nowhere/ca.pem", ["--judge-ca-file /nowhere/ca.pem is no file"]),
        ("--judge-max-missing-share 1", ["--judge-max-missing-share is 1", "below 1"]),
        ("--scoring adaptive --adaptive-budget 16", ["--adaptive-budget 16", "17 candidates", "at least 17"]),
        ("--judge-reading logit --judge-votes 5", ["--judge-votes 5", "--judge-reading logit"]),
        ("--judge-temperature 0 --judge-votes 5", ["--judge-votes 5", "at --judge-temperature 0", "the same question"]),
        (
            "--judge-set quality.votes=5 quality.reading=logit",
            ["--judge-set quality.votes 5", "--judge-set quality.reading logit"],
        ),
        (
            "--judge-temperature 0 --safety-weight 1 --judge-set safety.votes=3",
            ["--judge-set safety.votes 3", "at --judge-temperature 0"],
        ),
        ("--judge-set safty.votes=5", ["no judge safty", "did you mean safety?"]),
        ("--objective sft-rollout --judge-set safety.vots=5", ["did you mean votes?"]),
        ("--judge-set safety.votes=5", ["--judge-set names safety, whose weight is 0", "safety.weight"]),
        ("--judge-set quality.url=ftp://a", ["--judge-set quality.url", "http or https"]),
        ("--judge-set quality.interval=2", ["leave no judge", "--judge-set quality.interval"]),
        (
            "--judge-set harm.kind=classifier harm.classifier=toxic-bilstm",
            ["--judge-set harm.classifier toxic-bilstm", "--classifier-path"],
        ),
        ("--reward-weight 1 --judge-url --quality-weight 0", ["--judge-url is missing", "reward"]),
        (
            "--reward-weight 1 --reward-route score --judge-set reward.input=chat",
            ["--judge-set reward.input chat", "--reward-route score"],
        ),
        ("--screen-safety-below 0.5", ["--screen-safety-below 0.5", "--safety-weight or --classifier-weight"]),
        (
            "--safety-weight 1 --screen-safety-below 0.5 --judge-set safety.interval=5",
            ["--screen-safety-below 0.5 stops nobody", "--judge-set safety.interval 5", "--classifier-weight"],
        ),
        (
            "--safety-weight 1 --screen-safety-below 0.5 --likelihood-weight 1 "
            "--judge-set quality.interval=3 safety.interval=2",
            ["--screen-safety-below 0.5 stops nobody", "quality compares (every 3)"],
        ),
        (
            "--screen-repetition-above 0.5 --quality-weight 0 --safety-weight 1",
            ["--screen-repetition-above 0.5", "compares"],
        ),
        ("--classifier toxic-bilstm --classifier-weight 1", ["--classifier-path"]),
        (
            "--classifier toxic-bilstm --classifier-weight 1 --classifier-path no-such-folder",
            ["--classifier-path no-such-folder"],
        ),
        ("--objective sft-rewrite --judge-url", ["--rewriter-url", "--judge-url"]),
        ("--objective sft-rewrite --rewriter-url ftp://a", ["--rewriter-url", "http or https"]),
        ("--objective sft-rewrite --rewrite-interval 2", ["--objective sft-rewrite", "--rewrite-interval 2"]),
        ("--objective dpo-rewrite-over-rollout --rewrite-interval 2", ["--rewrite-interval 2"]),
    ],
)
def test_pools_judges_and_servers(line: str, words: list[str]) -> None:
    message = _message(line)
    assert all(word in message for word in words), message
    assert "\n" not in message, "one fault must be told alone"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--micro-batch-size 0", ["--micro-batch-size is 0", "at least 1"]),
        ("--tensor-model-parallel-size -2", ["--tensor-model-parallel-size is -2", "at least 1"]),
        ("--num-rollouts 0", ["--num-rollouts is 0", "at least 1"]),
        ("--lr 0", ["--lr is 0.0", "above 0"]),
        ("--lr nan", ["--lr is nan", "above 0"]),
        ("--beta inf", ["--beta is inf", "above 0"]),
        ("--temperature -0.1", ["--temperature is -0.1", "at least 0"]),
        ("--top-p 0", ["--top-p is 0.0", "at most 1"]),
        ("--top-p 1.01", ["--top-p is 1.01", "at most 1"]),
        ("--quality-weight -1", ["--quality-weight is -1.0", "at least 0"]),
        ("--adam-beta2 1", ["--adam-beta2 is 1.0", "below 1"]),
        ("--min-answered-fraction 1.5", ["--min-answered-fraction is 1.5", "between 0 and 1"]),
        ("--reward-scale 0", ["--reward-scale is 0.0", "a finite number other than 0"]),
        ("--reward-offset nan", ["--reward-offset is nan", "a finite number"]),
        ("--screen-safety-below 1.5", ["--screen-safety-below is 1.5", "between 0 and 1"]),
    ],
)
def test_numbers_out_of_range(line: str, words: list[str]) -> None:
    message = _message(line)
    assert all(word in message for word in words), message


def test_every_number_has_a_range() -> None:
    kinds = {item.name for item in settings().values() if not (item.is_bool or item.is_text or item.is_list)}
    words = {name for name in kinds if isinstance(_value(name), str)}
    optional_words = {"recompute_granularity", "judge_reasoning_effort"}
    assert kinds - words - optional_words == ranged_settings()


def _value(name: str) -> object:
    return getattr(getattr(Config(), settings()[name].group), name)


def test_all_faults_are_told_at_once() -> None:
    message = _message("--sequence-parallel --finetune --pool original")
    assert message.startswith("3 settings cannot be used:\n  - ")
    assert all(flag in message for flag in ("--sequence-parallel", "--finetune", "--pool original"))


def test_the_distributed_optimizer_takes_no_moving_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    message = _message("--use-distributed-optimizer")
    assert "--reference ema" in message
    assert "--reference frozen" in message
    validate(_config("--use-distributed-optimizer --reference frozen"), 1)
    validate(_config("--use-distributed-optimizer --objective rf-nll"), 1)


def test_the_distributed_optimizer_is_refused_where_its_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint was never proven; megatron-core 0.16.1's default format raises at the first save."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    line = "--use-distributed-optimizer --reference frozen"
    for folders in ("--save new", f"--load {tmp_path}", f"--load {tmp_path} --finetune --save new"):
        assert "--use-distributed-optimizer has state that --save and --load" in _message(f"{line} {folders}")
    validate(_config(f"{line} --load {tmp_path} --finetune"), 1)
    (tmp_path / "config.json").write_text("{}")
    validate(_config(f"{line} --load {tmp_path}"), 1)


def test_a_hugging_face_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    message = _message(f"--load {tmp_path} --save {tmp_path}/../{tmp_path.name}")
    assert "--save" in message
    assert "--load" in message


def test_a_new_run_may_name_the_same_empty_folder_twice(tmp_path: Path) -> None:
    validate(_config(f"--load {tmp_path}/new --save {tmp_path}/new"), 1)


def test_sizes_may_come_with_the_loaded_folder(tmp_path: Path) -> None:
    validate(_config(f"--model-preset none --load {tmp_path}"), 1)


def test_data_parallel_size() -> None:
    config = _config("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")
    assert data_parallel_size(config, 16) == 4


def test_neither_parsing_nor_checking_imports_megatron_core() -> None:
    code = (
        "import sys\nfrom megatron_sip.config.cli import parse_config\n"
        "from megatron_sip.config.validate import validate\n"
        "config = parse_config(sys.argv[1:])\nassert 'torch' not in sys.modules\n"
        "validate(config, 1)\nassert 'megatron.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, *GOOD], check=True)
