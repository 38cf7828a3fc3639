"""Files of statistics: what was added is what is read, layer by layer, also after a stop."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sums import CASES, WIDTH, blocks_of, exact, summed, whole

from a3.core.errors import A3Error
from a3.core.files import seal
from a3.rxx.container import Accumulator, Rxx, merge, outer_sum
from a3.rxx.files import sum_hash, write_tensors
from a3.rxx.kinds import KINDS, TRIANGULAR_FORMS, shape_of, stored_bytes
from a3.rxx.packed import STEPS, pack

LAYERS, HEADS = 12, 2
RECORD = {"tokens": 600, "weights_sha256": "w"}
FORMS = {"v_blocks": "blocks", "down_diagonal": "diagonal", "down_input_abs": "abs",
    "down_mean": "mean", "down_input_peak": "peak"}  # fmt: skip


def filled(kind, n=40, spool=None, layers=LAYERS, blocks=slice(None)):
    """An accumulator of some layers, which differ."""
    sums = Accumulator(kind, HEADS, spool)
    for layer in range(layers):
        for x in blocks_of("random", n)[blocks]:
            sums.add(layer, x * (layer + 1))
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMS)
def test_other_sums_are_of_float64_throughout(kind, dtype):
    """Not a bit other than as they were before triangles had a form of their own."""
    sums, blocks = Accumulator(kind, HEADS), blocks_of("scales", 64, dtype)
    expected = []
    for x in blocks:
        sums.add(3, x)
        wide = x.double()
        expected.append(
            {
                "blocks": lambda x=wide: torch.stack([y.T @ y for y in x.split(32, dim=1)]),
                "diagonal": lambda x=wide: x.square().sum(0),
                "abs": lambda x=wide: x.abs().sum(0),
                "mean": lambda x=wide: x.sum(0),
                "peak": lambda x=wide: x.abs().mean(0),
            }[FORMS[kind]]()
        )
    found = sums.tensors[3]["layers.3"]
    assert found.dtype == torch.float64
    total = expected[0]
    for value in expected[1:]:
        total = torch.maximum(total, value) if FORMS[kind] == "peak" else total + value
    if FORMS[kind] == "blocks":  # one product in place of two
        torch.testing.assert_close(found, total, rtol=1e-14, atol=1e-9)
        total = sum(outer_sum(x.double(), "blocks", HEADS) for x in blocks)
    assert torch.equal(found, total)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["down_input", "mlp_gradient"])
def test_what_is_read_is_what_was_added(tmp_path, kind, case):
    path, sums = tmp_path / "it.safetensors", Accumulator(kind, HEADS)
    blocks = blocks_of(case, WIDTH)
    for x in blocks:
        sums.add(0, x)
    sums.save(path, RECORD)
    R = Rxx(path, kind).R(0, (WIDTH, WIDTH))
    S = exact(blocks)
    root = S.diagonal().sqrt()
    sizes = root[:, None] * root / RECORD["tokens"]
    error = (R - S / RECORD["tokens"]).abs()
    assert (error <= sizes / (2 * STEPS) + len(blocks[0]) * 2**-24 * sizes).all()
    assert torch.equal(R, R.T)


def test_finished_layers_leave_no_file_even_if_the_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    sums = filled("down_input", layers=3)
    for layer in (2, 0, 1):
        sums.finish(layer)
    assert sums.finished == [0, 1, 2]
    assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == []
    sums.save(tmp_path / "one.safetensors", RECORD)
    assert list((tmp_path / "temporary").iterdir()) == []
    filled("down_input", layers=3, spool=tmp_path / "spool").save(
        tmp_path / "two.safetensors", RECORD
    )
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_files_have_the_bytes_of_the_library(tmp_path, dtype):
    tensors = {
        "b": torch.arange(3).to(dtype),
        "a": torch.arange(4.0, dtype=torch.float64).reshape(2, 2),
        "c": torch.tensor(5),
        "d": torch.tensor([7], dtype=torch.uint8),
    }
    write_tensors(tmp_path / "own.safetensors", tensors, {"kind": "x"})
    metadata = {"a3": json.dumps(seal({"kind": "x"}), sort_keys=True)}
    save_file(tensors, tmp_path / "library.safetensors", metadata)
    own, library = (tmp_path / f"{name}.safetensors" for name in ("own", "library"))
    assert own.read_bytes() == library.read_bytes()


@pytest.mark.parametrize("kind", ["down_input", "v_blocks", "down_diagonal"])
def test_finished_layers_are_on_disk_and_the_file_has_the_same_bytes(tmp_path, kind):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    filled(kind).save(paths[0], RECORD)
    one = filled(kind, spool=tmp_path / "spool")
    assert one.finished == []
    for layer in (5, 11, 0):
        one.finish(layer)
        assert layer not in one.tensors | one.triangles
    assert one.finished == [0, 5, 11]
    # A later one goes on with those.
    again = filled(kind, spool=tmp_path / "spool")
    assert again.finished == [0, 5, 11]
    for layer in again.finished:
        (again.triangles or again.tensors).pop(layer)
    again.save(paths[1], RECORD)
    assert again.finished == list(range(LAYERS))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # As the library writes them.
    metadata = {"a3": json.dumps(Rxx(paths[0], kind).record, sort_keys=True)}
    save_file(load_file(paths[0]), paths[2], metadata)
    assert paths[0].read_bytes() == paths[2].read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_statistics_of_experts_have_counts(tmp_path):
    sums, path = Accumulator("down_diagonal", HEADS), tmp_path / "it.safetensors"
    tokens = (1, 2, 0)
    for _ in range(2):
        sums.add_experts(1, [(torch.ones(n, 8), torch.full((n,), 0.5)) for n in tokens])
    sums.save(path, RECORD)
    rxx = Rxx(path, "down_diagonal")
    assert rxx.counts(1, 3).tolist() == [2, 4, 0]
    assert rxx.routed(1, 3).tolist() == [0.5, 1, 0]
    expected = torch.tensor([2.0, 4.0, 0.0]).double()[:, None].expand(3, 8) / RECORD["tokens"]
    assert torch.equal(rxx.R(1, (3, 8)), expected)
    assert torch.equal(rxx.R(1, (3, 8), 1), expected[1])
    assert rxx.layers() == [1]


EXPERTS = {
    "down_input": (4, 60, 60),
    "down_diagonal": (4, 60),
    "expert_norm": (4,),
    "expert_output": (4, 60),
}


def routed(generator):
    """Tokens of four experts, the last of which gets none, and their weights."""
    for tokens in (40, 7, 300, 0):
        yield (
            torch.randn(tokens, 60, generator=generator),
            torch.rand(tokens, generator=generator),
        )


@pytest.mark.parametrize("kind", EXPERTS)
def test_shards_of_experts_add_up_and_each_is_read_alone(tmp_path, kind):
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    whole_sums, generator = Accumulator(kind, 1), torch.Generator().manual_seed(0)
    expected = torch.zeros(EXPERTS[kind], dtype=torch.float64)
    for i, path in enumerate(paths):
        sums, blocks = Accumulator(kind, 1), [list(routed(generator)) for _ in range(2)]
        for block in blocks:
            sums.add_experts(0, block)
            whole_sums.add_experts(0, block)
            for expert, (x, _) in enumerate(block):
                x = x.double()
                expected[expert] += {
                    "down_input": lambda x=x: x.T @ x,
                    "down_diagonal": lambda x=x: x.square().sum(0),
                    "expert_norm": lambda x=x: x.norm(dim=1).sum(),
                    "expert_output": lambda x=x: x.sum(0),
                }[kind]()
        sums.save(path, {"tokens": 100, "shard": f"{i}of2"})
    merge([Rxx(path, kind) for path in paths], tmp_path / "merged.safetensors")
    whole_sums.save(tmp_path / "whole.safetensors", {"tokens": 200})
    for name in ("merged", "whole"):
        rxx = Rxx(tmp_path / f"{name}.safetensors", kind)
        assert rxx.counts(0, 4).tolist() == [160, 28, 1200, 0]
        for expert in range(4):
            found = rxx.R(0, EXPERTS[kind], expert) * 200
            torch.testing.assert_close(found, expected[expert], rtol=1e-5, atol=1e-3)
            if kind == "down_input":
                diagonals = rxx.diagonal(0, EXPERTS[kind])[expert] * 200
                assert torch.equal(diagonals, found.diagonal())
    arch = ARCH | {"experts": 4, "hidden_size": 60, "intermediate_size": 60, "layers": 1}
    size = (tmp_path / "whole.safetensors").stat().st_size - stored_bytes(arch, kind)
    assert 0 < size < 3000


@pytest.mark.parametrize("kind", ["down_input", "down_diagonal", "down_input_peak"])
def test_shards_add_up_to_the_whole(tmp_path, kind):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        filled(kind, WIDTH, None, 2, slice(i, i + 1)).save(
            path, RECORD | {"tokens": 200, "shard": f"{i}of3"}
        )
    merge([Rxx(path, kind) for path in paths], tmp_path / "out/it.safetensors")
    rxx = Rxx(tmp_path / "out/it.safetensors", kind)
    assert (rxx.tokens, rxx.settings["shards"]) == (600, 3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it.safetensors"]
    unsharded = filled(kind, WIDTH, None, 2)
    for layer in range(2):
        if kind != "down_input":
            divisor = 1 if kind == "down_input_peak" else 600
            expected = unsharded.tensors[layer][f"layers.{layer}"] / divisor
            torch.testing.assert_close(rxx.R(layer, (WIDTH,)), expected, rtol=1e-15, atol=0)
            continue
        S = whole(unsharded.triangles[layer][0])
        root = S.diagonal().sqrt()
        error = (rxx.R(layer, (WIDTH, WIDTH)).tril() * 600 - S).abs()
        # Half a step of each shard, which add up to that of the whole, and of the sum.
        assert (error <= 2 * root[:, None] * root / (2 * STEPS) * (1 + 1e-6)).all()


def test_a_sum_that_is_not_finite_is_named(tmp_path):
    for value in (float("nan"), float("inf")):
        for kind, key in (("down_input", "layers.2.diagonal"), ("down_diagonal", "layers.2")):
            sums, x = filled(kind, layers=3), blocks_of("random", 40)[0]
            x[4, 5] = value
            sums.add(2, x)
            with pytest.raises(A3Error, match=f"'{kind}': tensor '{key}' holds NaN or Inf"):
                sums.save(tmp_path / "it.safetensors", RECORD)
    assert not list(tmp_path.iterdir())


# --- files that are not right ---------------------------------------------------------------------


def square_of_float64(tensors):
    tensors["layers.1"] = torch.eye(40, dtype=torch.float64)


def without_diagonal(tensors):
    del tensors["layers.1.diagonal"]


def too_short(tensors):
    tensors["layers.1"] = tensors["layers.1"][:-1].clone()


def of_another_width(tensors):
    diagonal, packed = pack(summed(blocks_of("random", 41)))
    tensors |= {"layers.1": packed, "layers.1.diagonal": diagonal}


def half_the_diagonal(tensors):
    tensors["layers.1.diagonal"] = tensors["layers.1.diagonal"].float()


def infinite(tensors):
    tensors["layers.1.diagonal"][2] = torch.inf


DAMAGES = {
    square_of_float64: "tensor 'layers.1' is F64, expected U8.* collect again",
    without_diagonal: "no tensor 'layers.1.diagonal'. Collect again",
    too_short: r"'layers.1' is \(779, 3\), expected \(780, 3\)",
    of_another_width: r"'layers.1.diagonal' is \(41,\), expected \(40,\)",
    half_the_diagonal: "tensor 'layers.1.diagonal' is F32, expected F64",
    infinite: "tensor 'layers.1.diagonal' holds NaN or Inf",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_sealed_files_of_other_content_are_refused(tmp_path, damage):
    """Hashes fit: another version of a3 wrote them, or another program."""
    path = tmp_path / "down_input.safetensors"
    filled("down_input", layers=2).save(path, RECORD)
    tensors, record = load_file(path), Rxx(path, "down_input").settings
    damage(tensors)
    record["sums"] = {key: sum_hash(value) for key, value in tensors.items()}
    save_file(tensors, path, {"a3": json.dumps(seal(record))})
    with pytest.raises(A3Error, match=DAMAGES[damage]):
        Rxx(path, "down_input").R(1, (40, 40))


@pytest.mark.parametrize("key", ["layers.1", "layers.1.diagonal"])
def test_one_changed_byte_is_noticed(tmp_path, key):
    path = tmp_path / "down_input.safetensors"
    filled("down_input", layers=2).save(path, RECORD)
    tensors, record = load_file(path), Rxx(path, "down_input").record
    tensors[key].view(torch.uint8).flatten()[0] ^= 1
    save_file(tensors, path, {"a3": json.dumps(record)})
    with pytest.raises(A3Error, match=f"tensor '{key}' changed since it was written"):
        Rxx(path, "down_input").R(1, (40, 40))


def test_a_damaged_layer_of_a_spool_is_named(tmp_path):
    sums = filled("down_input", spool=tmp_path / "spool")
    sums.finish(3)
    path = tmp_path / "spool/down_input.3.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(A3Error, match=r"down_input\.3\.safetensors: truncated"):
        sums.save(tmp_path / "it.safetensors", RECORD)


# --- sizes ----------------------------------------------------------------------------------------

ARCH = {"layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 150, "hidden_size": 300, "experts": 0,
    "intermediate_size": 300, "mlp_inputs": 2, "rope_dims": 8}  # fmt: skip


@pytest.mark.parametrize("kind", ["down_input", "mlp_gradient", "v_blocks", "down_mean"])
def test_files_are_as_large_as_is_said(tmp_path, kind):
    sums, path = Accumulator(kind, HEADS), tmp_path / "it.safetensors"
    for layer in range(2):
        sums.add(layer, blocks_of("random", 300)[0])
    sums.save(path, RECORD)
    assert 0 < path.stat().st_size - stored_bytes(ARCH, kind) < 1200


def test_triangles_take_less_than_a_fifth_of_the_bytes():
    for n in (576, 1536, 4096, 14336):
        arch = ARCH | {"hidden_size": n, "intermediate_size": n, "heads": 1, "head_dim": n}
        for name, kind in KINDS.items():
            arch["experts"] = n if kind.site == "router" else 0
            if kind.form in TRIANGULAR_FORMS:
                (rows, columns), stored = shape_of(kind, arch), stored_bytes(arch, name)
                assert stored < 0.2 * 8 * rows * columns * arch["layers"]
