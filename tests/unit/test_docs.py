"""What README.md and docs/ say of flags, defaults and files is so."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_sip.config.fields import settings
from megatron_sip.config.groups import Config
from megatron_sip.metrics.names import metric_specs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
TORCHRUN = {
    *("--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--max-restarts"),
    "--shutdown-timeout",
}
SBATCH = {"--nodes", "--cpus-per-task", "--gpus-per-node", "--time"}
VLLM = {"--hf-overrides", "--block-size", "--worker-extension-cls", "--data-parallel-size"}
# What a page names as an example of what is refused.
WRONG_ON_PURPOSE = {"--x", "--y", "--x-api-key"}


@cache
def trainer_flags() -> set[str]:
    """Flags of megatron_sip.pretrain, with what switches off."""
    known = settings().values()
    return {
        "--help",
        "--config",
        *(setting.flag for setting in known),
        *("--no-" + setting.flag.removeprefix("--") for setting in known if setting.is_bool),
    }


@cache
def flags_of(module: str) -> set[str]:
    """Flags of a command line by its own help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return set(FLAG.findall(shown.getvalue()))


def tools() -> list[Path]:
    return [path for path in sorted((ROOT / "tools").rglob("*.py")) if "def main(" in path.read_text()]


def module_of(tool: Path) -> str:
    return ".".join(tool.relative_to(ROOT).with_suffix("").parts)


def shell_flags() -> set[str]:
    """Flags that our shell scripts take themselves, from the head of each."""
    scripts = [*ROOT.glob("examples/*.sh"), ROOT / "tests" / "run.sh"]
    heads = (path.read_text().split("set -euo", 1)[0] for path in scripts)
    return {flag for head in heads for flag in FLAG.findall(head)} | {"--help"}


def blocks(page: Path) -> Iterator[str]:
    """The commands of a page's shell blocks, each on one line."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield command


def owners(command: str) -> Iterator[tuple[str, set[str]]]:
    """The parts of a command and the flags that may stand in each."""
    places = [
        *((str(tool.relative_to(ROOT)), flags_of(module_of(tool))) for tool in tools()),
        ("-m megatron_sip.pretrain", trainer_flags()),
        ("-m megatron_sip.recipes", flags_of("megatron_sip.recipes.__main__")),
        ("examples/pretrain_sip_llama.sh", trainer_flags()),
        ("examples/slurm/sip_llama.sbatch", trainer_flags()),
        ("examples/serve_judge.sh", VLLM | {"--help"}),
        ("tests/run.sh", shell_flags()),
        ("vllm serve", VLLM),
        ("torchrun", TORCHRUN),
        ("-m torch.distributed.run", TORCHRUN),
        ("sbatch ", SBATCH),
    ]
    found = sorted((command.find(name), name, flags) for name, flags in places if name in command)
    starts = [start for start, _, _ in found] + [len(command)]
    yield command[: starts[0]], set()
    for (start, _, flags), end in zip(found, starts[1:], strict=True):
        yield command[start:end], flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_command_is_one_of_that_command(page: Path) -> None:
    for command in blocks(page):
        for part, flags in owners(command):
            unknown = set(FLAG.findall(part)) - flags
            assert not unknown, f"{page.name}: {sorted(unknown)} in: {command}"


def test_every_flag_that_is_named_exists() -> None:
    ours = trainer_flags() | shell_flags() | flags_of("megatron_sip.recipes.__main__")
    ours |= {flag for tool in tools() for flag in flags_of(module_of(tool))}
    known = ours | TORCHRUN | SBATCH | VLLM | WRONG_ON_PURPOSE
    named = {(flag, page.name) for page in PAGES for flag in FLAG.findall(page.read_text())}
    assert len(named) > 150, "the pages are read"
    assert not [(flag, page) for flag, page in sorted(named) if flag not in known]


def defaults_told(page: Path) -> Iterator[tuple[str, str]]:
    """(flag, default) from the tables whose second column is the default, where both cells list as many."""
    wanted = False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            wanted = False
        elif len(cells) > 1 and cells[1] == "default":
            wanted = True
        elif wanted and len(cells) > 1:
            flags, values = FLAG.findall(cells[0]), [value.strip() for value in cells[1].split(",")]
            if len(flags) == len(values):
                yield from zip(flags, values, strict=True)


def test_defaults_that_are_told_are_the_defaults() -> None:
    tool_flags = {flag for tool in tools() for flag in flags_of(module_of(tool))}
    checked = 0
    for page in PAGES:
        for flag, told in defaults_told(page):
            setting = settings().get(flag.removeprefix("--").replace("-", "_"))
            word = re.fullmatch(r"`?([\w.-]+)`?", told)
            if setting is None or word is None or flag in tool_flags:
                continue
            real = getattr(getattr(Config(), setting.group), setting.name)
            if real is None:
                continue  # the page says in words what is worked out
            if isinstance(real, bool):
                same = word[1] == ("on" if real else "off")
            else:
                same = float(word[1]) == real if isinstance(real, int | float) else word[1] == real
            assert same, f"{page.name}: {flag} is told to be {told}, it is {real}"
            checked += 1
    assert checked > 30


def test_every_metric_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    patterns = ("judge/missing_", "chosen/share_")  # told once for all reasons and kinds
    names = [spec.name for spec in metric_specs() if not spec.name.startswith(patterns)]
    assert not [name for name in names if f"`{name}`" not in page]


def test_every_file_that_is_named_exists() -> None:
    for page in PAGES:
        text = page.read_text()
        links = [page.parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
        words = re.findall(r"(?<![\w/.-])((?:tools|examples|tests|megatron_sip)/[\w./-]+\.(?:py|sh|sbatch|md))\b", text)
        gone = [path for path in [*links, *(ROOT / word for word in words)] if not path.exists()]
        assert not gone, f"{page.name}: {gone}"
