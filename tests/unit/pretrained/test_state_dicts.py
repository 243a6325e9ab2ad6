"""Whatever weights are wrapped in, the same are found, or one line says why not."""

import hypothesis
import pytest
from hypothesis import strategies as st

from pretrained.state_dicts import find_weights, pop_heads
from runtime.errors import UserError

ANCHOR = "x_embedder.proj.weight"
SHAPES = {
    "pos_embed": (1, 4, 6),
    ANCHOR: (6, 3, 2, 2),
    "t_embedder.mlp.0.weight": (6, 256),
    "blocks.0.attn.qkv.weight": (18, 6),
    "blocks.0.attn.proj.weight": (6, 6),
    "blocks.1.attn.proj.weight": (6, 6),
    "final_layer.linear.bias": (12,),
}
PROGRESS = {"opt.state.0.exp_avg": (6, 6), "optimizer.state.3.step": (), "epoch": ()}
WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "net",
    "transformer",
    "diffusion_model",
    "_forward_module",
)
RAW = ("model", "state_dict", "model_state_dict", "online_model", "net", "params", "non_ema")
AVERAGES = ("ema", "ema_model", "model_ema", "EMA", "ema_0.9999", "averaged_model", "target")


def find(shapes):
    return find_weights(shapes, (ANCHOR,), "a.pt", fixed=("pos_embed",))


def under(*parts, shapes=SHAPES):
    return {".".join([*parts, name]): shape for name, shape in shapes.items()}


def wrap_blocks(shapes, wrapper):
    """As torch.compile and FSDP wrap each block."""
    return {name.replace(".attn", f".{wrapper}.attn"): shape for name, shape in shapes.items()}


wrappings = st.lists(st.sampled_from(WRAPPERS), max_size=3)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    outer=st.sampled_from((None, *RAW)),
    average=st.sampled_from((None, *AVERAGES)),
    inner=wrappings,
    average_inner=wrappings,
    block=st.sampled_from((None, "_orig_mod", "_fsdp_wrapped_module", "module")),
    average_first=st.booleans(),
    progress=st.booleans(),
)
def test_however_a_copy_is_wrapped_it_is_found_and_the_average_wins(
    outer, average, inner, average_inner, block, average_first, progress
):
    own = wrap_blocks(SHAPES, block) if block else SHAPES
    raw = under(*filter(None, [outer]), *inner, shapes=own)
    averaged = under(average, *average_inner, shapes=own) if average else {}
    both = averaged | raw if average_first else raw | averaged
    found = find(both | (PROGRESS if progress else {}))
    assert sorted(found.names.values()) == sorted(SHAPES)
    chosen = averaged or raw
    assert {*found.names} == {*chosen}
    assert all(both[name] == SHAPES[ours] for name, ours in found.names.items())
    said = ["the weights are the average, "] if average else []
    assert [notice[: len(said[0])] for notice in found.notices] == said


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(
        st.lists(st.sampled_from((*WRAPPERS, *RAW, *AVERAGES, "teacher")), max_size=3).map(tuple),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_of_any_copies_one_is_found_whole_or_one_line_names_them(prefixes):
    shapes: dict[str, tuple[int, ...]] = {}
    for parts in prefixes:
        shapes |= under(*parts)
    try:
        found = find(shapes)
    except UserError as error:
        assert len(prefixes) > 1 and "save the one to use" in str(error)
        assert "\n" not in str(error) and len(str(error)) <= 300
    else:
        assert sorted(found.names.values()) == sorted(SHAPES)


@pytest.mark.parametrize("with_fixed", [True, False])
def test_an_average_that_is_a_list_belongs_to_the_weights_in_their_order(with_fixed):
    """As torch_ema and diffusers' EMAModel save it."""
    ours = [name for name in SHAPES if with_fixed or name != "pos_embed"]
    listed = {f"ema.shadow_params.{i}": SHAPES[name] for i, name in enumerate(ours)}
    found = find(under("model") | listed | {"ema.num_updates": ()})
    assert found.names["ema.shadow_params.2"] == ours[2]
    assert sorted(found.names.values()) == sorted(SHAPES)
    assert found.notices == ("the weights are the average, 'ema.shadow_params'",)


@pytest.mark.parametrize("prefix", ["", "diffusion_model"])
def test_an_average_whose_names_lost_their_dots_is_found(prefix):
    """As latent diffusion's LitEma saves it, without the positions that are not trained."""
    trained = {
        prefix + name.replace(".", ""): s for name, s in SHAPES.items() if name != "pos_embed"
    }
    shapes = under("model", "diffusion_model") | under("model_ema", shapes=trained)
    found = find(shapes | {"model_ema.decay": (), "model_ema.num_updates": ()})
    assert found.names[f"model_ema.{prefix}blocks0attnqkvweight"] == "blocks.0.attn.qkv.weight"
    assert found.names["model.diffusion_model.pos_embed"] == "pos_embed"
    assert sorted(found.names.values()) == sorted(SHAPES)


def test_an_average_that_is_not_understood_is_named():
    found = find(under("model") | {"ema.0.flat": (100,)})
    assert {*found.names} == {*under("model")}
    assert found.notices == ("the weights are raw: what is in 'ema.0' is not understood",)


def test_an_average_takes_what_is_never_trained_from_the_weights():
    averaged = {name: s for name, s in under("ema").items() if name != "ema.pos_embed"}
    found = find(under("model") | averaged)
    assert found.names["model.pos_embed"] == "pos_embed"
    assert found.names[f"ema.{ANCHOR}"] == ANCHOR


def test_a_teacher_is_not_taken_for_the_model():
    assert {*find(under("teacher") | under("model")).names} == {*under("model")}


def test_only_heads_beside_the_networks_own_parts_are_left_out():
    left = ["register_tokens", "decoder_blocks.0.weight", "blocks.0.head.weight"]
    heads = ["projectors.0.0.weight", "projectors.0.0.bias", "repa_head.weight"]
    tensors = dict.fromkeys([*SHAPES, *heads, *left])
    (notice,) = pop_heads(tensors, SHAPES)
    assert notice == (
        "ignored, as only training uses them: projectors (2 tensors), repa_head (1 tensors)"
    )
    assert [*tensors] == [*SHAPES, *left]
    assert pop_heads(tensors, SHAPES) == ()
