"""The engine on the tiny model: sampling, stops, probabilities, limits, cancellation, grammars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.engine.answering import Engine
from dist_ft.engine.protocol import Accepted, Ask, Piece, Prompt, Refused, Sampling
from tests.helpers.served import answers, ask_of, engine_spec, make_adapter, make_base, one_thread, text_of

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(engine_spec(base, tmp_path_factory.mktemp("config"), max_rows=4, max_waiting=8))


def test_seeded_draws_do_not_depend_on_the_neighbours(engine: Engine) -> None:
    ask = ask_of("a", "red", temperature=1.0, seed=3, n=2)
    alone = answers(engine, ask)
    beside = answers(engine, ask_of("b", "blue and green", temperature=1.0), ask, ask_of("c", "x" * 40))
    other = answers(engine, ask_of("a", "red", temperature=1.0, seed=4, n=2))
    assert [text_of(alone["a", i]) for i in (0, 1)] == [text_of(beside["a", i]) for i in (0, 1)]
    assert len({text_of(alone["a", 0]), text_of(alone["a", 1]), text_of(other["a", 0])}) == 3


def test_a_tiny_top_p_is_greedy(engine: Engine) -> None:
    greedy = answers(engine, ask_of("a", "red"))
    nucleus = answers(engine, ask_of("a", "red", temperature=1.0, top_p=1e-9))
    assert text_of(greedy["a", 0]) == text_of(nucleus["a", 0])


def test_a_bias_forces_and_a_penalty_forbids(engine: Engine, base: Path) -> None:
    token = AutoTokenizer.from_pretrained(base)("q")["input_ids"][0]
    forced = answers(engine, ask_of("a", "red", logit_bias=((token, 100.0),)))
    assert text_of(forced["a", 0]) == "q" * 12
    once = answers(engine, ask_of("a", "red", logit_bias=((token, 100.0),), presence_penalty=2.0, max_tokens=12))
    assert text_of(once["a", 0]) == "q" * 12, "100 outweighs 2"
    repeated = answers(engine, ask_of("a", "red", frequency_penalty=2.0, presence_penalty=2.0, logprobs=0))
    plain = answers(engine, ask_of("a", "red", logprobs=0))
    assert _num_different(repeated["a", 0]) >= _num_different(plain["a", 0])


def _num_different(pieces: list[Piece]) -> int:
    return len({chosen.token.utf8 for piece in pieces for chosen in piece.chosen})


def test_an_answer_ends_before_its_stop_text(engine: Engine) -> None:
    whole = text_of(answers(engine, ask_of("a", "red green", max_tokens=30))["a", 0])
    stop = whole[4:7]  # three tokens of the byte tokenizer, if they are ASCII
    pieces = answers(engine, ask_of("a", "red green", max_tokens=30, stop=("never said", stop)))["a", 0]
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"


def test_probabilities_are_those_of_the_unchanged_logits(engine: Engine, base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    pieces = answers(engine, ask_of("a", "red", temperature=0.3, logprobs=3, max_tokens=1, logit_bias=((5, 7.0),)))
    (chosen,) = [chosen for piece in pieces["a", 0] for chosen in piece.chosen]
    ids = tokenizer("red", return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), -1).topk(3).values.tolist()
    assert [likely.logprob for likely in chosen.top] == pytest.approx(expected, abs=1e-5)


def test_tokens_of_one_character_come_as_whole_text(engine: Engine, base: Path) -> None:
    first, second = AutoTokenizer.from_pretrained(base)("é")["input_ids"]
    schema = json.dumps({"const": "é"})
    pieces = answers(engine, ask_of("a", "red", grammar=schema, logit_bias=((first, 50.0), (second, 50.0))))["a", 0]
    assert text_of(pieces) == '"é"'
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_an_answer_fits_its_schema(engine: Engine) -> None:
    schema = {
        "type": "object", "properties": {"count": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["count", "ok"], "additionalProperties": False,
    }  # fmt: skip
    asks = [ask_of(str(n), f"red {n}", grammar=json.dumps(schema), temperature=1.0, seed=n, max_tokens=200) for n in
            range(4)]  # fmt: skip
    for pieces in answers(engine, *asks).values():
        if pieces[-1].finish == "stop":  # white space may go on for ever
            assert set(json.loads(text_of(pieces))) == {"count", "ok"}
    assert any(pieces[-1].finish == "stop" for pieces in answers(engine, *asks).values())


def test_a_queue_that_is_full_refuses(engine: Engine) -> None:
    found = [engine.submit(ask_of(str(n), "red", max_tokens=2)) for n in range(9)]
    assert [type(event) for event in found] == [Accepted] * 8 + [Refused]
    assert isinstance(found[-1], Refused) and (found[-1].status, found[-1].code) == (429, "engine_overloaded")
    assert {event.id for event in _drain(engine) if event.finish} == {str(n) for n in range(8)}


def _drain(engine: Engine) -> list[Piece]:
    found = []
    while not engine.is_idle:
        found += [event for event in engine.step() if isinstance(event, Piece)]
    return found


def test_what_cannot_be_answered_is_refused(engine: Engine) -> None:
    def refused(ask: Ask) -> Refused:
        event = engine.submit(ask)
        assert isinstance(event, Refused), event
        return event

    assert refused(ask_of("a", "x" * 3000)).code == "context_length_exceeded"
    assert refused(ask_of("a", "red", max_tokens=4000)).code == "context_length_exceeded"
    assert refused(ask_of("a", "red", n=5)).param == "n"
    assert refused(ask_of("a", "red", logit_bias=((99999, 1.0),))).param == "logit_bias"
    assert "token 99999" in refused(Ask("a", Prompt(tokens=(99999,)), Sampling())).message
    assert "JSON schema" in refused(ask_of("a", "red", grammar='{"type": "wrong"}')).message
    assert engine.is_idle


def test_one_request_that_is_cancelled_leaves_the_others_as_they_are(engine: Engine) -> None:
    alone = text_of(answers(engine, ask_of("b", "blue"))["b", 0])
    for ask in (ask_of("a", "a longer prompt", max_tokens=100), ask_of("b", "blue")):
        engine.submit(ask)
    pieces = [event for _ in range(3) for event in engine.step()]
    engine.cancel("a")
    pieces += _drain(engine)
    assert text_of([p for p in pieces if isinstance(p, Piece) and p.id == "b"]) == alone


def test_memory_for_keys_and_values_bounds_the_rows(base: Path, tmp_path: Path) -> None:
    cell = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    engine = Engine(engine_spec(base, tmp_path, cache_bytes=cell * 64))
    for n in range(4):
        engine.submit(ask_of(str(n), "red", max_tokens=20))  # 23 places a row
    list(engine.step())
    assert len(engine._batch.rows) == 2
    assert len({piece.id for piece in _drain(engine)}) == 4
    assert isinstance(event := engine.submit(ask_of("a", "red", max_tokens=100)), Refused) and "room" in event.message


def test_adapters_take_turns_in_memory(base: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(base, tmp_path / f"a{seed}", seed) for seed in (1, 2, 3)]
    engine = Engine(engine_spec(base, tmp_path, max_adapters=2))
    first = [text_of(answers(engine, ask_of("a", "red", adapter))["a", 0]) for adapter in adapters]
    assert len(engine._model.adapters) == 2
    again = [text_of(answers(engine, ask_of("a", "red", adapter))["a", 0]) for adapter in adapters]
    assert first == again and len(set(first)) == 3


def test_an_adapter_that_cannot_be_mixed_is_refused_and_can_be_folded_in(base: Path, tmp_path: Path) -> None:
    dora = make_adapter(base, tmp_path / "dora", 1, use_dora=True)
    event = Engine(engine_spec(base, tmp_path)).submit(ask_of("a", "red", dora))
    assert isinstance(event, Refused) and "DoRA" in event.message and "merge" in event.message
    plain = answers(Engine(engine_spec(base, tmp_path)), ask_of("a", "red"))
    merged = answers(Engine(engine_spec(base, tmp_path, merged=str(dora))), ask_of("a", "red"))
    assert text_of(plain["a", 0]) != text_of(merged["a", 0])
