"""The checkpoint store on the ranks of this launch: what is saved, when it is named, what is refused, what fails.

torchrun check_checkpoint_store.py FOLDER TP
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder, named_iteration
from megatron_sip.checkpoint.lock import LOCK, SaveLock
from megatron_sip.checkpoint.manifest import MANIFEST, file_entry, read_manifest, write_manifest
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.checkpoint.restricted import UnsafeFileError
from megatron_sip.config.groups import CheckpointConfig, Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel import world as world_module
from megatron_sip.types import PreferenceBatch

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    max_position_embeddings=32,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    vocab_size=100,
)


class Attack:
    """Unpickled carelessly, it makes the marker file."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


def batch(seed: int) -> PreferenceBatch:
    """Two pairs of random tokens."""
    tokens = torch.randint(1, 100, (2, 24), generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((2,), 8)
    return PreferenceBatch(tokens, lengths, lengths, lengths, torch.ones(2), torch.tensor([2 * seed, 2 * seed + 1]))


class StoreCheck:
    """One trainer and the folder that it saves to."""

    def __init__(self, root: Path, tp: int) -> None:
        self.root, self.marker = root, root.parent / "it-ran"
        self.config = Config(
            model=MODEL,
            parallel=ParallelConfig(tensor_model_parallel_size=tp),
            training=TrainingConfig(micro_batch_size=1, global_batch_size=4 // tp),
            checkpoint=CheckpointConfig(save=str(root)),
        )
        self.world = world_module.start(self.config)
        from megatron_sip.checkpoint import dist as dist_checkpoint
        from megatron_sip.checkpoint import writer
        from megatron_sip.checkpoint.choose import choose
        from megatron_sip.model.build import build_policy
        from megatron_sip.training.step import PolicyTrainer

        self.dist_checkpoint, self.writer_module, self.choose = dist_checkpoint, writer, choose
        self.trainer = PolicyTrainer(build_policy(self.config, self.world), self.config, self.world)
        self.said: list[str] = []

    def writer(self, lock: SaveLock | None = None, **settings: Any) -> Any:
        config = replace(self.config, checkpoint=replace(self.config.checkpoint, **settings))
        made = self.writer_module.CheckpointWriter(config, self.world, self.said.append, lock or SaveLock(None, print))
        made.prepare()
        return made

    def step(self, seed: int) -> None:
        result = self.trainer.step(batch(seed))
        assert not result.skipped

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that training changes."""
        found = {f"policy.{name}": value for name, value in self.trainer.policy.named_parameters()}
        found |= {f"reference.{name}": value for name, value in self.trainer.reference.tensors.items()}
        for place, parameter in enumerate(self.trainer.policy.parameters()):
            moments = self.moments().get(parameter, {})
            found |= {f"moment.{place}.{name}": value for name, value in moments.items()}
        return {name: value.detach().clone() for name, value in found.items()}

    def moments(self) -> dict[Any, dict[str, torch.Tensor]]:
        parts = getattr(self.trainer.optimizer, "chained_optimizers", [self.trainer.optimizer])
        return {parameter: state for part in parts for parameter, state in part.optimizer.state.items()}

    @torch.no_grad()
    def spoil(self) -> None:
        """Change everything at once, in place, as a step would."""
        for value in (*self.trainer.policy.parameters(), *self.trainer.reference.tensors.values()):
            value.fill_(float("nan"))
        for moments in self.moments().values():
            for value in moments.values():
                value.fill_(float("nan") if value.dim() else 99.0)

    def load(self, expected: int) -> Progress:
        folder = self.choose(self.root, self.world, self.said.append)
        assert folder == checkpoint_folder(self.root, expected), folder
        return self.dist_checkpoint.load(folder, self.world, self.trainer, self.said.append, weights_only=False)

    def same(self, wanted: dict[str, torch.Tensor]) -> None:
        found = self.state()
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        different = [name for name, value in found.items() if not torch.equal(value, wanted[name])]
        assert not different, different

    def on_main(self, action: Callable[[], object]) -> None:
        """Do it on one rank while the others wait, none of which still reads what it changes."""
        dist.barrier(group=self.world.control_group)
        if self.world.is_main:
            action()
        dist.barrier(group=self.world.control_group)

    @contextmanager
    def refused(self, *says: str, kind: type[Exception] = CheckpointError) -> Iterator[None]:
        """All ranks meet the same error, and nothing ran."""
        with pytest.raises(kind) as caught:
            yield
        said: list[str] = [""] * self.world.size
        dist.all_gather_object(said, str(caught.value), group=self.world.control_group)
        assert len(set(said)) == 1, said
        for part in says:
            assert part in said[0], f"{part!r} is not in {said[0]}"
        assert not self.marker.exists()


def progress(iteration: int) -> Progress:
    return Progress(iteration, 4 * iteration, {"kind": "test", "position": iteration})


def check_a_stop_before_the_first_update(check: StoreCheck) -> None:
    """A checkpoint without moments, loaded into an optimizer that has some, as a rollback does."""
    check.writer().save(check.trainer, progress(0))
    start = check.state()
    check.step(1)
    first = check.state()
    check.step(2)
    check.load(0)
    check.same(start)
    check.step(1)
    check.same(first)
    assert any("holds no optimizer state" in line for line in check.said)


def check_the_state_at_the_call_is_saved(check: StoreCheck) -> None:
    """Everything changes as soon as save returns, while the file of the last rank is held up."""
    writer, may_write = check.writer(async_save=True), threading.Event()
    real = check.writer_module.write_pieces

    def slow(path: Path, pieces: Any) -> Any:
        if check.world.rank == check.world.size - 1 or check.world.tp_size == 1:
            assert may_write.wait(60)
        return real(path, pieces)

    check.writer_module.write_pieces = slow
    wanted = check.state()
    writer.save(check.trainer, progress(3))
    check.spoil()
    for _ in range(3):
        assert writer.poll() is None
    assert named_iteration(check.root) == 0
    assert writer.last_saved is None
    dist.barrier(group=check.world.control_group)
    may_write.set()
    assert writer.finish() == checkpoint_folder(check.root, 3)
    check.writer_module.write_pieces = real
    assert writer.last_saved == named_iteration(check.root) == 3
    assert check.load(3) == progress(3)
    check.same(wanted)


def check_a_save_finishes_the_one_before(check: StoreCheck) -> None:
    writer = check.writer(async_save=True)
    before = check.state()
    writer.save(check.trainer, progress(4))
    check.step(4)
    after = check.state()
    writer.save(check.trainer, progress(5))
    assert writer.last_saved == 4
    writer.finish()
    assert writer.finish() is None
    assert check.load(5) == progress(5)
    check.same(after)
    check.on_main(lambda: (check.root / LATEST).write_text("4\n"))
    assert check.load(4) == progress(4)
    check.same(before)
    check.on_main(lambda: (check.root / LATEST).write_text("5\n"))


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_a_full_disk(check: StoreCheck, *, rank: int, limit: int, async_save: bool) -> None:
    """One rank cannot write: all hear of it, the last good checkpoint stays, and the next save works."""
    check.load(5)
    wanted, writer = check.state(), check.writer(async_save=async_save)
    with file_size_limit(limit if check.world.rank == rank else resource.RLIM_INFINITY):
        with check.refused("cannot write", "iter_0000007.incomplete", "File too large", "free space"):
            writer.save(check.trainer, progress(7))
            check.spoil()
            writer.finish()
        assert writer.finish() is None
    assert named_iteration(check.root) == 5
    check.load(5)
    check.same(wanted)


def check_a_name_that_cannot_be_given(check: StoreCheck) -> None:
    """Everything is written, but the latest file cannot be."""
    blocker = (check.root / LATEST).with_suffix(".tmp")
    check.on_main(blocker.mkdir)
    writer = check.writer(async_save=True)
    with check.refused("cannot write", "Is a directory"):
        writer.save(check.trainer, progress(7))
        writer.finish()
    assert named_iteration(check.root) == 5
    check.on_main(blocker.rmdir)
    check.load(5)


def check_a_folder_that_cannot_be_written(check: StoreCheck) -> None:
    in_the_way = check.root.parent / "a-file"
    check.on_main(in_the_way.touch)
    with check.refused("cannot write to --save", "a-file", "File exists"):
        check.writer(save=str(in_the_way))
    with check.refused("cannot write to --save", "Not a directory"):
        check.writer(save=str(in_the_way / "below"))
    with (
        file_size_limit(100 if check.world.rank == check.world.size - 1 else resource.RLIM_INFINITY),
        check.refused("cannot write to --save", "File too large"),
    ):
        check.writer()


def check_a_changed_byte(check: StoreCheck) -> None:
    """In a file of the last rank: all ranks pass the checkpoint over."""
    wanted = check.state()
    check.writer().save(check.trainer, progress(8))
    [file] = sorted((checkpoint_folder(check.root, 8)).glob("*.distcp"))[-1:]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    check.on_main(lambda: file.write_bytes(content))
    check.said.clear()
    check.spoil()
    # The checkpoint of 7 is whole, though its name could not be written.
    assert check.load(7) == progress(7)
    check.same(wanted)
    [warning] = [line for line in check.said if "WARNING" in line]
    assert f"{file.parent} is damaged: {file.name} has changed" in warning
    assert f"taking {checkpoint_folder(check.root, 7)}" in warning
    # The run goes on from there and comes by 8 again.
    check.writer().save(check.trainer, progress(8))
    assert check.load(8) == progress(8)


def seal(folder: Path) -> None:
    """Let the manifest agree with what the folder holds, as one who attacks would."""
    files = {path.name: file_entry(path) for path in folder.iterdir() if path.name != MANIFEST}
    write_manifest(folder, replace(read_manifest(folder), files=files))


def check_attacks(check: StoreCheck) -> None:
    """`.metadata`, common.pt and an item of bytes that name a program."""
    folder = checkpoint_folder(check.root, 8)
    whole = {name: (folder / name).read_bytes() for name in (".metadata", "common.pt", MANIFEST)}
    metadata = pickle.loads(whole[".metadata"])
    metadata.all_local_plans.append(Attack(check.marker))

    def refuse(name: str, content: bytes, *says: str) -> None:
        check.on_main(lambda: ((folder / name).write_bytes(content), seal(folder)))
        with check.refused(*says, "names posix.system, which no checkpoint needs", kind=UnsafeFileError):
            check.load(8)
        check.on_main(lambda: [(folder / name).write_bytes(content) for name, content in whole.items()])

    refuse(".metadata", pickle.dumps(metadata), str(folder / ".metadata"))
    evil = io.BytesIO()
    torch.save({"format_version": 1, "evil": Attack(check.marker)}, evil)
    refuse("common.pt", evil.getvalue(), str(folder / "common.pt"))

    metadata, item = pickle.loads(whole[".metadata"]), io.BytesIO()
    torch.save([Attack(check.marker)], item)
    [index, *_] = [found for found in metadata.storage_data if "_extra_state" in found.fqn]
    metadata.storage_data[index] = replace(
        metadata.storage_data[index], relative_path="evil.distcp", offset=0, length=len(item.getvalue())
    )
    check.on_main(lambda: (folder / "evil.distcp").write_bytes(item.getvalue()))
    refuse(".metadata", pickle.dumps(metadata), index.fqn)
    check.on_main((folder / "evil.distcp").unlink)
    assert check.load(8) == progress(8)


def check_retention(check: StoreCheck) -> None:
    writer = check.writer(keep_last_n=2, save_retain_interval=5)
    for iteration in (9, 10, 11, 12):
        writer.save(check.trainer, progress(iteration))
    found = sorted(path.name for path in check.root.glob("iter_*"))
    assert found == [f"iter_{kept:07d}" for kept in (0, 5, 10, 11, 12)], found


def check_a_lost_lock(check: StoreCheck) -> None:
    """Another run took the folder while this one stood still: it names nothing there any more."""
    file, lock = check.root / LOCK, SaveLock(check.root if check.world.is_main else None, check.said.append)
    lock.acquire()
    writer = check.writer(lock, async_save=True)
    for begun in (False, True):
        if begun:
            writer.save(check.trainer, progress(13))
        check.on_main(lambda: file.write_text("another's"))
        with check.refused(f"--save {check.root} was taken over by", "it saves nothing more"):
            if not begun:
                writer.save(check.trainer, progress(13))
            writer.finish()
        check.on_main(file.unlink)
    assert named_iteration(check.root) == 12
    assert not checkpoint_folder(check.root, 13).exists()
    lock.release()


def main() -> None:
    root, tp = Path(sys.argv[1]) / "saved", int(sys.argv[2])
    check = StoreCheck(root, tp)
    check_a_stop_before_the_first_update(check)
    check.step(3)
    check_the_state_at_the_call_is_saved(check)
    check_a_save_finishes_the_one_before(check)
    if tp > 1:
        last = check.world.size - 1
        check_a_full_disk(check, rank=last, limit=20000, async_save=True)
        check_a_full_disk(check, rank=last, limit=20000, async_save=False)
        check_a_full_disk(check, rank=0, limit=20000, async_save=True)
        check_a_name_that_cannot_be_given(check)
        check_a_folder_that_cannot_be_written(check)
        check_a_changed_byte(check)
        check_attacks(check)
        check_retention(check)
        check_a_lost_lock(check)
    if check.world.is_main:
        print("checkpoint store ok")
    world_module.stop()


if __name__ == "__main__":
    main()
