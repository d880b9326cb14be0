"""Conversions between folders: the same bits, the same files as `--save` makes, and nothing half done."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hf_toys import KINDS, toy_llama
from safetensors.torch import load_file, save_file

from megatron_sip.checkpoint import convert_to_mcore
from megatron_sip.checkpoint.hf import Conversion, convert
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.checkpoint.latest import whole_problem
from megatron_sip.checkpoint.stream_read import StoredTensors
from megatron_sip.checkpoint.stream_write import write_distributed
from megatron_sip.config.run_config import load_run_config
from megatron_sip.errors import CheckpointError
from tools.checkpoint.convert import main


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: Path, other: Path) -> None:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def to_mcore(source: Path, target: Path, **settings) -> Path:
    convert(Conversion("hf", "mcore", source, target, **settings))
    return target


def to_hf(source: Path, target: Path, **settings) -> Path:
    convert(Conversion("mcore", "hf", source, target, **settings))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bitwise_with_and_without_padding(kind, tmp_path):
    """At TP 1 and 2, and from the checkpoint of TP 2 to one of TP 3: the padding comes and goes."""
    toy_llama(tmp_path / "hf", **KINDS[kind])
    for tp_size in (1, 2):
        to_mcore(tmp_path / "hf", tmp_path / f"tp{tp_size}", tensor_parallel=tp_size)
        same(tmp_path / "hf", to_hf(tmp_path / f"tp{tp_size}", tmp_path / f"back{tp_size}", max_shard_bytes=20_000))
        assert len(list((tmp_path / f"back{tp_size}").glob("model-*.safetensors"))) > 2
    (tmp_path / "tp2" / "journal").mkdir()
    said: list[str] = []
    job = Conversion("mcore", "mcore", tmp_path / "tp2", tmp_path / "tp3", tensor_parallel=3, pipeline_parallel=2)
    convert(job, say=said.append)
    assert said[-1].startswith("the journal of verdicts and rewrites stays behind; copy ")
    same(tmp_path / "hf", to_hf(tmp_path / "tp3", tmp_path / "back3"))
    read = load_run_config(tmp_path / "tp3" / "iter_0000000" / "run_config.yaml").parallel
    assert (read.tensor_model_parallel_size, read.pipeline_model_parallel_size) == (3, 2)


def test_sharded_bf16_in_and_fp32_out_hold_the_same_values(tmp_path):
    original = toy_llama(tmp_path / "one", dtype=torch.bfloat16)
    original.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    assert load_run_config(tmp_path / "mcore" / "iter_0000000" / "run_config.yaml").training.bf16
    same(tmp_path / "one", to_hf(tmp_path / "mcore", tmp_path / "back"))
    to_mcore(tmp_path / "hf", tmp_path / "wide", dtype=torch.float32)
    assert not load_run_config(tmp_path / "wide" / "iter_0000000" / "run_config.yaml").training.bf16
    wide = weights(to_hf(tmp_path / "wide", tmp_path / "wide-hf"))
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in weights(tmp_path / "one").items())
    same(tmp_path / "one", to_hf(tmp_path / "wide", tmp_path / "narrow-hf", dtype=torch.bfloat16))
    assert json.loads((tmp_path / "narrow-hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_is_a_whole_checkpoint_that_knows_its_model(tmp_path):
    toy_llama(tmp_path / "hf", **KINDS["odd_groups_tied"])
    to_mcore(tmp_path / "hf", tmp_path / "mcore", tensor_parallel=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text().strip() == "0"
    folder = tmp_path / "mcore" / "iter_0000000"
    assert whole_problem(folder) is None
    config = load_run_config(folder / "run_config.yaml")
    assert config.model == model_config_from_hf(tmp_path / "hf")
    assert (config.parallel.tensor_model_parallel_size, config.parallel.pad_query_groups) == (2, True)
    stored = StoredTensors(folder)
    assert stored.size("decoder.layers.self_attention.linear_qkv.weight") == (3, 4 * 5 * 4, 36)
    assert stored.size("embedding.word_embeddings.weight") == (256, 36)
    assert "output_layer.weight" not in stored.names
    # Each rank's rows are a piece of their own; gate and up lie apart.
    chunks = stored.chunks("decoder.layers.mlp.linear_fc1.weight")
    assert chunks[:4] == [((0, row, 0), (1, 24, 36)) for row in (0, 48, 24, 72)]
    assert sorted(stored.objects)[:2] == [f"decoder.layers.mlp.linear_fc1._extra_state/shard_{n}_3" for n in (0, 1)]
    common = torch.load(folder / "common.pt", weights_only=True)
    assert (common["iteration"], common["consumed_samples"]) == (0, 0)


def test_hf_to_hf_changes_the_type_and_keeps_what_else_the_folder_says(tmp_path):
    toy_llama(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    before = json.loads((tmp_path / "hf" / "config.json").read_text())
    convert(Conversion("hf", "hf", tmp_path / "hf", tmp_path / "half", dtype=torch.bfloat16))
    after = weights(tmp_path / "half")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in weights(tmp_path / "hf").items())
    said = json.loads((tmp_path / "half" / "config.json").read_text())
    assert said == before | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert (tmp_path / "half" / "generation_config.json").read_text() == '{"eos_token_id": [7, 9]}'


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(tmp_path: Path, match: str, **job) -> None:
    """The conversion is refused by name, and nothing at all was written."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    settings = {"loader": "hf", "saver": "mcore", "load_dir": tmp_path / "hf", "save_dir": tmp_path / "out"} | job
    with pytest.raises(CheckpointError, match=match):
        convert(Conversion(**settings))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("saver", ["hf", "mcore"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_local_experts": 8}, "mixture-of-experts"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 32\), config.json means \(32, 32\)"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, named, saver, tmp_path):
    toy_llama(tmp_path / "hf")
    rewrite_config(tmp_path / "hf", **change)
    refused(tmp_path, named, saver=saver)


def test_settings_that_mean_nothing_or_cannot_be_are_refused(tmp_path):
    toy_llama(tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    refused(tmp_path, "--iteration means nothing without --loader mcore", iteration=3)
    refused(
        tmp_path, "--target-tensor-parallel-size means nothing without --saver mcore", saver="hf", tensor_parallel=2
    )
    refused(tmp_path, "--target-pipeline-parallel-size means nothing", saver="hf", pipeline_parallel=2)
    refused(tmp_path, "--weights-only means nothing", weights_only=True)
    refused(tmp_path, "--target-tensor-parallel-size is 0", tensor_parallel=0)
    refused(tmp_path, "--target-tensor-parallel-size 5 is more than the model's 4", tensor_parallel=5)
    refused(tmp_path, "--target-pipeline-parallel-size 4 is more than the model's 3 layers", pipeline_parallel=4)
    refused(tmp_path, "never overwritten", save_dir=tmp_path / "mcore")
    mcore = {"loader": "mcore", "saver": "hf", "load_dir": tmp_path / "mcore"}
    refused(tmp_path, r"iter_0000007 is no whole checkpoint.*choose another --iteration", **mcore, iteration=7)
    refused(tmp_path, "holds no checkpoint", loader="mcore", saver="hf")


def test_a_layout_that_cannot_cut_the_feed_forward_is_refused(tmp_path):
    toy_llama(tmp_path / "hf", intermediate_size=50)
    refused(tmp_path, "4 does not divide 50 --ffn-hidden-size", tensor_parallel=4)


def test_types_that_no_run_has_need_a_choice(tmp_path):
    toy_llama(tmp_path / "hf", dtype=torch.float16)
    refused(tmp_path, "holds torch.float16 weights.*choose --dtype")
    to_mcore(tmp_path / "hf", tmp_path / "mcore", dtype=torch.float32)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path, r"several types \(float16, float32\); choose one with --dtype")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: truncate(folder / "__0_0.distcp"), "__0_0.distcp has"),
        (lambda folder: change_a_byte(folder / "__0_0.distcp"), "checksum differs"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / ".metadata").unlink(), "metadata is missing"),
        (lambda folder: (folder / "run_config.yaml").unlink(), "run_config.yaml is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(damage, named, tmp_path):
    toy_llama(tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    damage(tmp_path / "mcore" / "iter_0000000")
    refused(tmp_path, named, loader="mcore", saver="hf", load_dir=tmp_path / "mcore")


def test_a_checkpoint_without_manifest_that_lacks_a_part_is_named(tmp_path):
    """Its metadata describe less than the model: memory that nobody filled must not become weights."""
    toy_llama(tmp_path / "hf")
    folder = to_mcore(tmp_path / "hf", tmp_path / "mcore") / "iter_0000000"
    (folder / "manifest.json").unlink()
    metadata = StoredTensors(folder)._reader.read_metadata()
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    import pickle

    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    named = r"only 0 of 1536 values of decoder\.layers\.mlp\.linear_fc2\.weight are there"
    refused(tmp_path, named, loader="mcore", saver="hf", load_dir=tmp_path / "mcore")
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(tmp_path, "lacks decoder.final_layernorm", loader="mcore", saver="hf", load_dir=tmp_path / "mcore")


def test_a_checkpoint_that_is_not_the_model_of_its_run_config_is_refused(tmp_path):
    toy_llama(tmp_path / "hf")
    folder = to_mcore(tmp_path / "hf", tmp_path / "mcore") / "iter_0000000"
    (folder / "manifest.json").unlink()
    file, source = folder / "run_config.yaml", {"loader": "mcore", "saver": "hf", "load_dir": tmp_path / "mcore"}
    text = file.read_text()
    for wrong, named in (
        ("num_layers: 4", "has 3 layers, its run_config.yaml 4"),
        ("hidden_size: 40", r"has shape .* on this rank, expected"),
        ("untie_embeddings_and_output_weights: false", "holds output_layer.weight, which the model"),
        ("vocab_size: 200", "128 vocabulary rows, fewer than the model's"),
    ):
        key = wrong.split(":", maxsplit=1)[0]
        file.write_text(re.sub(rf"(?m)^  {key}: .*$", f"  {wrong}", text))
        refused(tmp_path, named, **source)


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)


def test_a_malicious_metadata_runs_nothing(tmp_path):
    import pickle

    toy_llama(tmp_path / "hf")
    folder = to_mcore(tmp_path / "hf", tmp_path / "mcore") / "iter_0000000"
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "pwned")))
    refused(tmp_path, "could run a program", loader="mcore", saver="hf", load_dir=tmp_path / "mcore")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("loader", "saver"), [("hf", "mcore"), ("mcore", "hf"), ("mcore", "mcore"), ("hf", "hf")])
def test_an_interruption_leaves_nothing(loader, saver, tmp_path):
    toy_llama(tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(loader, saver, tmp_path / loader, tmp_path / "out"), interrupt)
    assert len(seen) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("loader", "saver"), [("hf", "mcore"), ("mcore", "hf")])
def test_a_disk_that_refuses_is_named_and_leaves_nothing(loader, saver, tmp_path):
    toy_llama(tmp_path / "hf", hidden_size=128, intermediate_size=512)
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with largest_file(400_000), pytest.raises(CheckpointError, match=r"cannot write .*out"):
        convert(Conversion(loader, saver, tmp_path / loader, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_a_disk_that_is_full_only_behind_the_weights_is_named_too(tmp_path, monkeypatch, capsys):
    toy_llama(tmp_path / "hf")

    def fill_the_disk(folder: Path, *arguments) -> None:
        write_distributed(folder, *arguments)
        (folder / "common.pt").symlink_to("/dev/full")

    monkeypatch.setattr(convert_to_mcore, "write_distributed", fill_the_disk)
    flags = ["--loader", "hf", "--saver", "mcore", "--load-dir", str(tmp_path / "hf")]
    assert main([*flags, "--save-dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"convert: cannot write {tmp_path / 'out'}: No space left on device; nothing was changed there"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_link_out_of_the_tokenizers_folder_is_not_copied(tmp_path):
    toy_llama(tmp_path / "hf")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "hf" / "merges.txt").symlink_to(tmp_path / "secret")
    refused(tmp_path, r"merges\.txt is a link to .*secret", saver="hf")
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    shutil.move(tmp_path / "hf", cache / "snapshots" / "0123")
    (cache / "blobs").mkdir()
    link = cache / "snapshots" / "0123" / "merges.txt"
    link.unlink()
    (cache / "blobs" / "abcd").write_text("lawful")
    link.symlink_to(Path("../../blobs/abcd"))
    convert(Conversion("hf", "hf", cache / "snapshots" / "0123", tmp_path / "out"))
    assert (tmp_path / "out" / "merges.txt").read_text() == "lawful"
    assert not (tmp_path / "out" / "merges.txt").is_symlink()
