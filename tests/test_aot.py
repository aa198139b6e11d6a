"""What a step needs (counted in its trace), what a compiled program does (read from its text), and one real compilation
for a TPU that is not there."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_packing
import toy

from refine_jax import bagel_objective, flops, objectives, parallel, recipes
from refine_jax.data import packing
from refine_jax.errors import RefineError
from refine_jax.models import segments, splash
from refine_jax.train import load_config

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import hlo  # noqa: E402

f32 = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)


# --------------------------------------------------------------------------------------------------------- FLOPs needed


def test_products_are_counted_once_and_by_kind():
    dense = 2 * 4 * 5 * 6
    assert flops.count(lambda a, b: a @ b, f32(4, 5), f32(5, 6)) == flops.Flops(dense)
    assert flops.count(lambda a, b: (a @ b, a @ b)[0], f32(4, 5), f32(5, 6)) == flops.Flops(dense)  # dead code
    scores = lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)
    assert flops.count(scores, f32(2, 3, 4, 5), f32(2, 7, 4, 5)) == flops.Flops(0.0, 2.0 * 2 * 3 * 4 * 5 * 7)
    layers = lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
    assert flops.count(layers, f32(4, 5), f32(7, 5, 5)) == flops.Flops(7 * 2 * 4 * 5 * 5)
    image = lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert flops.count(image, f32(1, 8, 8, 3), f32(3, 3, 3, 16)) == flops.Flops(2 * 4 * 4 * 16 * 9 * 3)
    # Of the branches of a conditional the cheapest; a product in a loop of unknown length is no number.
    branch = lambda flag, x: jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert flops.count(branch, jax.ShapeDtypeStruct((), bool), f32(4, 4)) == flops.Flops(2 * 4**3)
    endless = lambda x: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x)
    with pytest.raises(ValueError, match="unknown length"):
        flops.count(endless, f32(4, 4))


def test_only_what_is_trained_has_a_gradient():
    """y = x W + x A B: a frozen W costs its product and, below other layers, the gradient of its input."""

    def loss(lora, frozen, x):
        for (a, b), w in zip(lora, frozen):
            x = x @ w + (x @ a) @ b
        return x.sum()

    n, d, r = 16, 8, 2
    lora, frozen = [(f32(d, r), f32(r, d))] * 2, [f32(d, d)] * 2
    found = flops.count(jax.grad(loss), lora, frozen, f32(n, d))
    weight, adapter = 2 * n * d * d, 2 * 2 * n * d * r
    # Forwards: the result of the last layer is summed, but its terms are dead then. Backwards: input gradients of the
    # second layer only, and both gradients of each adapter's two products.
    first, second = adapter / 2 * 3, weight + adapter / 2 * 3 + adapter
    assert found.attention == 0 and weight <= found.dense <= 2 * weight + first + second + adapter
    remat = flops.count(jax.grad(jax.checkpoint(loss)), lora, frozen, f32(n, d))
    assert remat.dense >= found.dense


def test_a_step_of_a_lora():
    """Attention between activations: three times its forward pass, whatever is rematerialised."""
    config = toy.shipped("edit_debug")
    model = toy.model_config()
    found = flops.of_step(config, model, objectives.make(config, model).batch_shapes()[0])
    rows, mmdit = config.batch_size, model.mmdit
    text = config.data.text_length - model.prompt.drop_tokens
    image = 4 * 64 * 64 // (model.vae.spatial_ratio * mmdit.patch_size) ** 2
    joint = 3 * 2 * 2 * rows * (text + image) ** 2 * mmdit.width * mmdit.num_layers
    assert joint <= found.attention <= 1.3 * joint  # the encoder's and the VAE's own are the rest


def test_chips_are_known_by_their_kind():
    class Device:
        device_kind = "TPU v6 lite"

    assert flops.chip(Device()).flops == 918e12 and flops.chip(jax.devices("cpu")[0]) is None
    Device.device_kind = "TPU v5"
    assert flops.chip(Device()).name == "v5p"


# ----------------------------------------------------------------------------------------------------------- FLOPs done


def test_loops_count_as_often_as_they_run():
    """Products in nested scans; XLA's own count takes each body once."""
    x, w = np.ones((32, 48), np.float32), np.ones((5, 48, 48), np.float32)

    def run(x, w):
        outer = lambda x, _: (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], None)
        return jax.lax.scan(outer, x, None, length=3)[0]

    compiled = jax.jit(run).lower(x, w).compile()
    module = hlo.Module(compiled.as_text())
    assert module.work().flops == 3 * 5 * 2 * 32 * 48 * 48
    assert ("f32", (32, 48)) in module.buffers() and not module.work().collectives


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, use", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], use", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, use", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, use", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, use", [[0, 1], [1, 0]]),
    ],
)
def test_groups_of_collectives(text, groups):
    assert hlo._groups(text).tolist() == groups


MODULE = """\
HloModule step, is_scheduled=true

%inside (p0: bf16[60,16,3072], p1: s32[]) -> bf16[1,16,3072] {
  %p0 = bf16[60,16,3072]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = bf16[1,16,3072]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,3072}
}

%cond (c: (s32[], bf16[60,16,3072])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[60,16,3072]{2,1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(60)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], bf16[60,16,3072])) -> (s32[], bf16[60,16,3072]) {
  %b = (s32[]{:T(128)}, bf16[60,16,3072]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %w = bf16[60,16,3072]{2,1,0} get-tuple-element(%b), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  %part = bf16[1,16,3072]{2,1,0:T(8,128)} fusion(%w, %j), kind=kLoop, calls=%inside
  %whole = bf16[1,64,3072]{2,1,0:T(8,128)S(1)} all-gather(%part), replica_groups={{0,1,2,3}}, dimensions={1}, \
metadata={op_name="jit(step)/blocks"}
  %conv = bf16[1,64,64]{2,1,0:T(8,128)S(1)} convolution(%whole, %whole), window={size=1}, dim_labels=0bf_0oi->0bf
  ROOT %out = (s32[]{:T(128)}, bf16[60,16,3072]{2,1,0}) tuple(%next, %w)
}

ENTRY %main (a: (s32[], bf16[60,16,3072])) -> (s32[], bf16[60,16,3072]) {
  %a = (s32[]{:T(128)}, bf16[60,16,3072]{2,1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[60,16,3072]{2,1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_a_tpu_programs_text():
    """An unrolled loop of 30 steps: slices of a stack are read, not the stack; VMEM (`S(1)`) is not memory traffic."""
    work = hlo.Module(MODULE).work()
    part = 16 * 3072 * 2
    assert work.flops == 30 * 2 * 64 * 64 * 3072
    # Read and written by the slice, read by the all-gather; four scalars.
    assert work.hbm_bytes == 30 * (part + part + part + 4 * 4)
    [collective] = work.collectives
    assert (collective.kind, collective.bytes, collective.times) == ("all-gather", 3 * part, 30)
    assert collective.what == "jit(step)/blocks"


CHAIN = """\
HloModule step, is_scheduled=true

%first (p: bf16[16,128]) -> bf16[64,128] {
  %p = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="CHAIN_OF_1"}
}

%second (q: bf16[16,128]) -> bf16[64,128] {
  %q = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="CHAIN_OF_2"}
}

ENTRY %main (a: bf16[16,128]) -> (bf16[64,128], bf16[64,128]) {
  %a = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %one = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%first
  %two = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%second
  ROOT %both = (bf16[64,128]{1,0}, bf16[64,128]{1,0}) tuple(%one, %two)
}
"""


@pytest.mark.parametrize("chains, count", [(("5", "5"), 1), (("5", "6"), 2)])
def test_a_collective_behind_several_fusions_counts_once(chains, count):
    """The compiler writes it into each of the fusions that it goes on behind, with the number of its chain."""
    text = CHAIN.replace("CHAIN_OF_1", chains[0]).replace("CHAIN_OF_2", chains[1])
    assert [one.bytes for one in hlo.Module(text).work().collectives] == [3 * 16 * 128 * 2] * count


SCATTER = """\
HloModule step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %table = u32[4]{0:T(128)} constant({...})
  %id = u32[] partition-id()
  %place = u32[1]{0:T(128)} dynamic-slice(%table, %id), dynamic_slice_sizes={1}
  %start = u32[]{:T(128)} bitcast(%place)
  %zero = u32[] constant(0)
  ROOT %part = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%sum, %start, %zero), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[64,128], b: s32[]) -> (bf16[16,128], bf16[16,128]) {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %mine = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/gradient"}
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  %cut = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%whole, %b, %zero), dynamic_slice_sizes={16,128}
  ROOT %out = (bf16[16,128]{1,0}, bf16[16,128]{1,0}) tuple(%mine, %cut)
}
"""


def test_a_sum_and_a_slice_in_one_fusion_are_a_reduce_scatter():
    scattered, summed = hlo.Module(SCATTER).work().collectives
    size = 64 * 128 * 2
    assert (scattered.kind, scattered.bytes, scattered.what) == ("reduce-scatter", size * 3 / 4, "jit(step)/gradient")
    assert (summed.kind, summed.bytes) == ("all-reduce", 2 * size * 3 / 4)
    assert scattered.shapes == summed.shapes == (("bf16", (64, 128)),)


KERNEL = """\
HloModule step, is_scheduled=true

ENTRY %main (q: bf16[4,512,128], k: bf16[4,1024,128]) -> bf16[4,512,128] {
  %q = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,1024,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %splash_mha_fwd_residuals.1 = bf16[4,512,128]{2,1,0:T(8,128)(2,1)} custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,512,128]{2,1,0}, bf16[4,1024,128]{2,1,0}, \
bf16[4,1024,128]{2,1,0}}, metadata={op_name="jit(step)/attention"}
}
"""


def test_blocks_that_a_kernel_skips_do_not_count():
    module, whole = hlo.Module(KERNEL), 2.0 * 2 * 4 * 512 * 1024 * 128
    assert module.work().kernels == {"fwd": whole}
    assert module.work({(512, 1024): 0.25}).flops == whole / 4
    assert module.work({(512, 512): 0.25}).flops == whole


def test_a_full_row_of_samples_that_are_apart():
    """What `aot` takes for the blocks that a packed row's attention computes: each sample's own, on every chip."""
    import aot

    model = test_packing.MODEL
    shapes = packing.shapes(packing.Bucket((32, 32), (16, 16), 4, 128, 16))
    batch = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    row = bagel_objective.even_row(batch)
    assert {name: (value.shape[1:], value.dtype) for name, value in row.items()} == shapes
    streams = bagel_objective.row_segments(model, row)
    for stream in streams:
        samples, counts = np.unique(stream.sample[0], return_counts=True)
        assert samples.tolist() == [0, 1, 2, 3] and len(set(counts)) == 1
    total = sum(stream.sample.shape[1] for stream in streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "block_size", lambda length: 4)
        [((queries, keys), whole)] = aot.computed_blocks(model, batch, 1).items()
        [((half, _), share)] = aot.computed_blocks(model, batch, 2).items()
    assert queries == keys == total and half == total // 2
    tokens = segments.join(segments.join(*streams[:2]), streams[2])
    span = segments.segment_mask(tokens, tokens, one_target=True).span[0]
    assert whole == pytest.approx(np.mean(splash._span_blocks(span, total, 4, 4)[0].block_mask))
    assert whole <= share < 0.3


def test_products_written_as_convolutions():
    """Batch dimensions of a product become a spreading window that meets one element an output."""
    spread = {"size": "8", "stride": "7", "pad": "0_0", "lhs_dilate": "8"}
    assert hlo._meetings(spread, given=8, made=8) == 1.0
    assert hlo._meetings({"size": "3", "pad": "1_1"}, given=4, made=4) == (3 * 4 - 2) / 4
    assert hlo._meetings({"size": "2"}, given=2, made=1) == 2.0


# ------------------------------------------------------------------------------------------------------------- on a TPU


def compile_for_a_tpu() -> None:
    """Runs in a process of its own: a LoRA step of a few small blocks, and the sampler of the same model, compiled for
    four chips; prints their reports."""
    import aot

    # From a cache: neither VAE nor encoder are in the program. 1 024 image tokens are enough for the kernel.
    data = {"data.source": "cache", "data.buckets": "((64, 64),)"}
    config = load_config(toy.CONFIGS / "edit_debug.py", data | {"mesh": "{'fsdp': 2, 'context': 2}"})
    model = toy.model_config()
    wide = dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56), num_layers=2, zero_cond_t=True)
    vae = dataclasses.replace(model.vae, dim_mult=(1, 2), temperal_downsample=(False,))
    model = dataclasses.replace(model, vae=vae, mmdit=dataclasses.replace(model.mmdit, **wide))
    mesh = parallel.make_mesh(dict(config.mesh), aot.described_devices("v5e:2x2"))
    made = aot.lower_train(config, mesh, model, 0)
    report, text = aot.analyse(config, "edit_debug", "v5e:2x2", "train", made)
    print(aot.row(report))
    print(json.dumps(dataclasses.asdict(report) | {"splash": text.count("splash_mha_fwd")}))
    config = recipes.batch(batch_size=2, dtype="bfloat16")
    made = aot.lower_sample(config, mesh, model, (128, 128))
    report, text = aot.analyse(config, "edit_debug", "v5e:2x2", "sample", made)
    print(aot.row(report))
    print(json.dumps(dataclasses.asdict(report) | {"splash": text.count("splash_mha_fwd")}))


def run_here(code: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths, "TPU_SKIP_MDS_QUERY": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)


def test_a_step_compiles_for_a_tpu_that_is_not_there():
    done = run_here("import test_aot; test_aot.compile_for_a_tpu()")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    report, sample = json.loads(lines[-3]), json.loads(lines[-1])
    assert report["chips"] == 4 and report["chip"] == "TPU v5 lite" and report["splash"] >= 1
    assert report["whole"] == [] and 0 < report["argument_bytes"] < report["peak_bytes"] < report["hbm_bytes"]
    # The kernel's own FLOPs, padded and with the scores computed again, are more than the objective needs.
    assert 0 < report["needed_attention"] < report["done_attention"] < report["done_flops"]
    assert report["collective_bytes"]["all-gather"] > 0 and report["compute_seconds"] > 0
    assert lines[-2].startswith("| edit_debug | sample | v5e:2x2 (4) |") and " a picture |" in lines[-2]
    assert sample["splash"] >= 1 and sample["collective_bytes"]["all-gather"] > 0
    assert 0 < sample["needed_attention"] < sample["done_attention"] and sample["peak_bytes"] < sample["hbm_bytes"]


def test_a_topology_that_does_not_exist():
    sys_path = "import aot, sys; sys.exit(aot.main(['configs/edit_debug.py', '--topology', 'v5e:nine']))"
    done = run_here(sys_path)
    assert done.returncode == 2 and "--topology 'v5e:nine'" in done.stderr, done.stderr[-2000:]


def test_configurations_that_cannot_be_compiled_say_why():
    import aot

    with pytest.raises(RefineError, match="set init_from"):
        aot.architecture(toy.refine_config("somewhere"))
