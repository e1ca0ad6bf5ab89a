"""Pictures: every word inside, embeddings and head drawn, a color per method."""

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import GPT2Config, LlamaConfig

from hft.merging.diff import plot_comparison
from hft.methods.schedule import to_row
from hft.model.anatomy import anatomy_of, meta_model
from hft.record.palette import FROZEN, METHODS, OWN, TRAINED, style_of
from hft.record.picture import plot_schedule, plot_selection
from hft.selection import SelectionConfig, select
from tests.conftest import ROOT

LONG = "llama2-7b-sft-hft-per_device_train_batch_size=1-learning_rate=0.00002-max_steps=100-selection_seed=17"


def llama(layers: int, **more) -> LlamaConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=layers, vocab_size=100, **heads, **more)


def selection_of(config, **keys):
    return select(anatomy_of(meta_model(config)), SelectionConfig(**keys))


def check_words(figure) -> None:
    """All words lie inside, and neither the legend nor the title covers the labels of the axes."""
    FigureCanvasAgg(figure).draw()
    boxes = {"title": figure._suptitle} | {f"legend {n}": one for n, one in enumerate(figure.legends)}
    axes = [text for one in figure.axes for text in (one.xaxis.label, one.yaxis.label, one.title, one._left_title)]
    for axis in (axis for one in figure.axes for axis in (one.xaxis, one.yaxis)):
        low, high = sorted(axis.get_view_interval())
        axes += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = {name: one.get_window_extent() for name, one in boxes.items() if one is not None}
    labels = {text.get_text(): text.get_window_extent() for text in axes if text.get_text()}
    for name, box in (boxes | labels).items():
        assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) > -1, name
    assert not [(name, label) for name, a in boxes.items() for label, b in labels.items() if a.overlaps(b)]


@pytest.mark.parametrize("layers", [4, 30, 80])
def test_no_word_is_clipped_or_covered(layers):
    selection = selection_of(llama(layers))
    check_words(plot_selection(selection, LONG))
    check_words(plot_schedule(selection, [to_row(selection, 0, selection.trained_units)], 10, LONG))
    models = ["fft", "hft", LONG[:60], LONG[:60] + "1"]
    change = dict.fromkeys(models, 1e-05)
    rows = [{"what": str(n), "block": block, "change": change} for n in range(layers) for block in ("attention", "mlp")]
    found = {"start": "models/llama", "layers": rows, "rounds": {LONG[:60]: rows[::2]}}
    check_words(plot_comparison(found, {model: model for model in models}))


def test_embeddings_and_head_are_drawn():
    def drawn(config, **keys) -> tuple[list[str], list[float]]:
        axes = plot_selection(selection_of(config, **keys)).axes[0]
        ends = [float(one.get_array().ravel()[0]) for one in axes.collections[1:]]
        return [label.get_text() for label in axes.get_yticklabels()], ends

    names, ends = drawn(llama(2))
    assert (names[0], names[1], names[-1], ends) == ("embed_tokens", "q_proj", "lm_head", [1, 1])
    names, ends = drawn(llama(2, tie_word_embeddings=True), freeze_embeddings=True)
    assert (names[0], names[-1], ends) == ("embed_tokens", "post_attention_layernorm", [0])
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0)
    names, ends = drawn(gpt2)
    assert (names[:2], ends) == (["wte", "wpe"], [1, 1])
    selection = selection_of(gpt2)
    axes = plot_schedule(selection, [to_row(selection, 0, selection.trained_units)], 2).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wte", "wpe", "0", "1"]


def test_a_method_has_one_color_and_marker_everywhere():
    names = {path.stem for path in Path(ROOT, "recipes/methods").glob("*.yaml")} | set(METHODS) | set(OWN)
    styles = {name: style_of(name) for name in names}
    assert names == set(METHODS) | set(OWN)
    assert len(set(styles.values())) == len(names)
    assert TRAINED == style_of("hft")[0] == style_of("hft epochs 3")[0] != FROZEN
    assert style_of("hft epochs 3") != style_of("hft epochs 4") != style_of("hft")
    found = {"start": "base", "layers": [], "rounds": {}}
    for models in (["lisa", "hft"], ["fft", "a", "hft", "lisa"]):
        rows = [{"what": "0", "block": block, "change": dict.fromkeys(models, 1e-5)} for block in ("attention", "mlp")]
        axes = plot_comparison(found | {"layers": rows}, {model: model for model in models}).axes[0]
        assert {line.get_label(): line.get_color() for line in axes.lines}["lisa"] == styles["lisa"][0]
