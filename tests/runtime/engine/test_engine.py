"""The engine in one process: lossless, in company or alone, ended where one-at-a-time decoding ends."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import Queue

import pytest

from runtime import Config, Engine, InvalidRequestError, LookaheadConfig, ResourceExhaustedError, SamplingParams
from runtime.engine.loop import EngineLoop
from runtime.equality import Equality, hugging_face_gap
from runtime.errors import ConfigError, WorkerError
from runtime.request import FinishReason, StepOutput
from runtime.tuning.cost import CostCurve
from tests.models import save_tiny_model

PLAIN = LookaheadConfig(enabled=False)
SETTINGS = {
    "jacobi": LookaheadConfig(planner=False, sources=("jacobi",)),
    "suffix": LookaheadConfig(planner=False, sources=("suffix",)),
    "recycle": LookaheadConfig(planner=False, sources=("recycle",), row_budget=40),
    "all": LookaheadConfig(planner=False),
    "bigrams": LookaheadConfig(planner=False, sources=("jacobi",), window_size=1, ngram_size=2, guess_set_size=1),
    "tall": LookaheadConfig(planner=False, window_size=2, ngram_size=9, guess_set_size=3),
    "budget": LookaheadConfig(planner=False, row_budget=64),
    "planner": LookaheadConfig(),
    "alone": LookaheadConfig(share=False),
}


def make_prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.choices(range(256), k=generator.randint(1, longest)) for _ in range(count)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = Config.from_dict(
        {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 4, "max_rows": 192, "max_waiting": 2}}
    )
    with Engine.from_config(config) as engine:
        yield engine


@pytest.fixture(scope="module")
def gap_of(tiny_model):
    return hugging_face_gap(tiny_model)


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_lookahead_equals_autoregressive(engine, gap_of, name, temperature):
    sampling = SamplingParams(max_new_tokens=56, temperature=temperature, seed=7)
    # Sampled tokens are compared with Gumbel noise in the balance, so only greedy ones may diverge at a near-tie.
    equality = Equality(gap_of, tolerance=1e-4 if temperature == 0 else 0.0)
    for prompt in make_prompts(5):
        plain, looked = (engine.generate([prompt], sampling, setting)[0] for setting in (PLAIN, SETTINGS[name]))
        equality.compare(prompt, plain.token_ids, looked.token_ids, name)
        assert looked.finish_reason == plain.finish_reason
        assert plain.usage.tokens_per_step == 1
    assert equality.lossless, equality
    assert equality.num_tokens > 200 and len(equality.divergences) <= 1


def test_greedy_equals_hugging_face(engine, tiny_model, gap_of):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    equality = Equality(gap_of)
    for prompt in make_prompts(5, seed=1):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        ours = engine.generate([prompt], SamplingParams(max_new_tokens=60))[0].token_ids
        equality.compare(prompt, whole[0, len(prompt) :].tolist(), ours)
    assert equality.lossless, equality
    assert equality.num_tokens > 100


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
def test_company_changes_nothing(engine, gap_of, temperature):
    """More prompts than slots, of all lengths, some longer than a step: the same tokens as alone."""
    prompts = [*make_prompts(5, seed=2), *make_prompts(3, longest=400, seed=3)]
    sampling = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)
    together = engine.generate(prompts, sampling)
    equality = Equality(gap_of, tolerance=1e-4 if temperature == 0 else 0.0)
    for prompt, completion in zip(prompts, together, strict=True):
        equality.compare(prompt, engine.generate([prompt], sampling, PLAIN)[0].token_ids, completion.token_ids)
    assert equality.lossless, equality
    assert not engine.has_work


def test_two_requests_advance_in_the_same_step(engine):
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6, 7])):
        engine.add_request(engine.make_request(prompt, SamplingParams(max_new_tokens=8), request_id=name))
    assert {output.request_id for output in engine.step()} == {"a", "b"}
    while engine.has_work:
        engine.step()


@pytest.mark.slow
def test_stop_tokens_end_an_accepted_run_in_its_middle(engine):
    """For every token of a text as stop token, the answer ends at its first occurrence."""
    prompt = make_prompts(1, seed=4)[0]
    text = engine.generate([prompt], SamplingParams(max_new_tokens=60, ignore_eos=True), PLAIN)[0].token_ids
    cut_runs = 0
    for stop in set(text):
        sampling = SamplingParams(max_new_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
        completion = engine.generate([prompt], sampling)[0]
        assert completion.token_ids == text[: text.index(stop) + 1]
        assert completion.finish_reason == FinishReason.STOP
        assert completion.text == engine.tokenizer.decode(completion.token_ids[:-1])
        assert completion.usage.num_new_tokens == len(completion.token_ids) == sum(completion.run_lengths)
        cut_runs += completion.run_lengths[-1] > 1
    assert cut_runs > 0


def test_max_new_tokens_ends_exactly(engine):
    prompt = make_prompts(1, seed=5)[0]
    text = engine.generate([prompt], SamplingParams(max_new_tokens=30, ignore_eos=True), PLAIN)[0].token_ids
    for count in range(1, 30):
        completion = engine.generate([prompt], SamplingParams(max_new_tokens=count, ignore_eos=True))[0]
        assert completion.token_ids == text[:count]
        assert completion.finish_reason == FinishReason.LENGTH


def test_a_full_slot_ends_the_request_with_length(tiny_model):
    config = Config.from_dict({"model": {"path": str(tiny_model)}, "cache": {"capacity": 48}})
    sampling = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    with Engine.from_config(config) as small:
        for length in (1, 30, 47):
            prompt = list(range(length))
            completion = small.generate([prompt], sampling)[0]
            assert len(completion.token_ids) == 48 - length
            assert completion.finish_reason == FinishReason.LENGTH
            plain = small.generate([prompt], sampling, PLAIN)[0]
            assert plain.token_ids == completion.token_ids
        with pytest.raises(InvalidRequestError, match="48"):
            small.generate([list(range(48))], sampling)


def test_seeds_repeat_and_differ(engine):
    def run(seed):
        return engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=30, temperature=1.0, seed=seed))[0].token_ids

    assert run(1) == run(1) != run(2)


def test_abort_frees_the_slot_at_the_next_step(engine):
    sampling = SamplingParams(max_new_tokens=400, ignore_eos=True)
    for index in range(6):
        engine.add_request(engine.make_request([index + 1], sampling, request_id=str(index)))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (4, 2)
    for index in (0, 5):
        engine.abort(str(index))
    outputs = engine.step()
    cancelled = {output.request_id for output in outputs if output.finish_reason == FinishReason.CANCELLED}
    assert cancelled == {"0", "5"}
    assert (engine.num_running, engine.num_waiting) == (4, 0)
    for index in range(1, 5):
        engine.abort(str(index))
    engine.step()
    assert not engine.has_work


def test_leaving_a_stream_early_withdraws_the_request(engine):
    stream = engine.stream([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    engine.step()
    assert not engine.has_work


def test_a_full_queue_refuses_one_more(engine):
    sampling = SamplingParams(max_new_tokens=1)
    for index in range(6):
        engine.add_request(engine.make_request([1], sampling, request_id=f"queued-{index}"))
    with pytest.raises(ResourceExhaustedError, match="max_waiting"):
        engine.add_request(engine.make_request([1], sampling))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize(
    ("prompt", "sampling", "lookahead", "field"),
    [
        ([], SamplingParams(), PLAIN, "prompt"),
        ([999], SamplingParams(), PLAIN, "token_ids"),
        ([-1], SamplingParams(), PLAIN, "token_ids"),
        ([1] * 512, SamplingParams(), PLAIN, "prompt"),
        ([1], SamplingParams(stop_token_ids=(262,)), PLAIN, "sampling.stop_token_ids"),
        ([1], SamplingParams(), LookaheadConfig(planner=False, window_size=100), "lookahead.window_size"),
    ],
)
def test_bad_requests_name_the_field(engine, prompt, sampling, lookahead, field):
    with pytest.raises(InvalidRequestError) as error:
        engine.make_request(prompt, sampling, lookahead)
    assert error.value.field == field and error.value.remedy


def test_a_repeated_request_id_is_refused(engine):
    request = engine.make_request([1], SamplingParams(max_new_tokens=1), request_id="twice")
    engine.add_request(request)
    with pytest.raises(InvalidRequestError, match="request_id"):
        engine.add_request(request)
    engine.step()


def test_text_and_chat_prompts(engine):
    text = engine.make_request("héllo")
    assert engine.tokenizer.decode(text.prompt_ids) == "héllo"
    chat = engine.make_request([{"role": "user", "content": "hi"}])
    assert len(chat.prompt_ids) == 1 + len("hi\n") + 1


def test_step_time_is_accounted_for(engine):
    before = dict(engine.stats.seconds)
    steps = engine.stats.num_steps
    engine.generate([[5, 6]], SamplingParams(max_new_tokens=10))
    assert engine.stats.num_steps > steps
    for phase in ("plan", "forward", "verify"):
        assert engine.stats.seconds[phase] > before[phase]


def test_where_rows_are_free_the_planner_runs_many_and_a_window_and_stays_lossless(tiny_model, gap_of):
    equality = Equality(gap_of)
    sampling = SamplingParams(max_new_tokens=80, ignore_eos=True)
    config = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 2, "max_rows": 160}}
    with Engine.from_config(config) as engine:
        engine.use_curve(CostCurve((1, 160), (1.0, 1.0001)))
        engine.cost.observe = lambda num_rows, seconds: None  # type: ignore[method-assign]
        for prompt in make_prompts(3, seed=4):
            plain, looked = (engine.generate([prompt], sampling, setting)[0] for setting in (PLAIN, LookaheadConfig()))
            equality.compare(prompt, plain.token_ids, looked.token_ids)
        assert looked.usage.rows_per_step > 40
        assert engine.knowledge.windows.size != (0, 0)
        capped = engine.generate([prompt], sampling, LookaheadConfig(row_budget=9))[0]
        assert capped.token_ids == plain.token_ids and capped.usage.rows_per_step <= 9
    assert equality.lossless and len(equality.divergences) <= 1, equality


def test_where_rows_are_dear_the_planner_decodes_plainly(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "scheduler": {"max_sequences": 2, "max_rows": 160}}
    with Engine.from_config(config) as engine:
        engine.use_curve(CostCurve((1, 160), (1.0, 160.0)))
        engine.cost.observe = lambda num_rows, seconds: None  # type: ignore[method-assign]
        answer = engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=40, ignore_eos=True))[0]
    assert answer.usage.rows_per_step < 1.5


def test_a_chats_answer_ends_where_its_template_ends_it(tmp_path) -> None:
    """Though the configs know another end token only: a chat would go on for ever."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|tool|>{% endfor %}<|assistant|>"
    save_tiny_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    turn_end, chat = 259, [{"role": "user", "content": "Hello"}]
    with Engine.from_config({"model": {"path": str(tmp_path)}, "lookahead": {"enabled": False}}) as engine:
        assert engine.spec.eos_token_ids == (261,)
        assert engine.make_request(chat).sampling.stop_token_ids == (turn_end,)
        assert engine.make_request(chat, SamplingParams(stop_token_ids=(7,))).sampling.stop_token_ids == (7, turn_end)
        assert engine.make_request(chat, SamplingParams(ignore_eos=True)).sampling.stop_token_ids == ()
        assert engine.make_request("Hello").sampling.stop_token_ids == ()


def test_broken_weights_are_named_before_workers_start(tmp_path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="model.safetensors: is empty"):
        Engine.from_config({"model": {"path": str(tmp_path)}, "parallel": {"tp": 2}})


TEN = SamplingParams(max_new_tokens=10, ignore_eos=True)


def in_turns(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The answers of streams that are read in turns, one piece each."""
    streams = {index: engine.stream(prompt, TEN) for index, prompt in enumerate(prompts)}
    found: list[list[int]] = [[] for _ in prompts]
    while streams:
        for index, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[index]
            else:
                found[index] += output.token_ids
    return found


def test_streams_and_generate_inside_one_another_lose_nothing(engine):
    prompts = make_prompts(6, seed=11)  # more than there are slots
    alone = [list(engine.generate([prompt], TEN)[0].token_ids) for prompt in prompts]
    assert in_turns(engine, prompts) == alone
    outer: list[int] = []
    for number, output in enumerate(engine.stream(prompts[0], TEN)):
        outer += output.token_ids
        if number == 1:
            inner = engine.generate(prompts[1:], TEN)
    assert outer == alone[0] and [list(completion.token_ids) for completion in inner] == alone[1:]
    assert not engine.has_work


def test_threads_may_ask_at_the_same_time(engine):
    prompts = make_prompts(8, seed=12)
    alone = [list(engine.generate([prompt], TEN)[0].token_ids) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(engine.generate, [prompt], TEN) for prompt in prompts]
        assert [list(future.result(60)[0].token_ids) for future in asked] == alone


def test_an_interrupted_generate_withdraws_its_requests(engine, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.executor, "execute", interrupted)
        engine.generate([[1], [2]], TEN)
    engine.step()
    assert not engine.has_work


def test_a_closed_engine_says_so(tiny_model):
    with Engine.from_config({"model": {"path": str(tiny_model)}, "lookahead": {"enabled": False}}) as engine:
        stream = engine.stream([1, 2], TEN)
        next(stream)
    for use in (lambda: next(stream), lambda: engine.generate([1, 2]), engine.open_session, engine.step):
        with pytest.raises(WorkerError, match="the engine is closed"):
            use()
    stream.close()
    engine.close()


def test_a_session_is_closed_once_and_is_a_session(engine):
    session = engine.open_session()
    for _ in range(2):
        engine.close_session(session)
    with pytest.raises(InvalidRequestError, match="^session = 'session-1': is of type str"):
        engine.make_request([1], session="session-1")


def test_a_forked_process_is_told_that_the_engine_is_not_its_own(engine):
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        try:
            engine.generate([1, 2], TEN)
        except BaseException as error:
            os.write(theirs, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as said:
        assert said.read().startswith(b"WorkerError: the engine belongs to process")
    os.waitpid(child, 0)
    assert engine.generate([1, 2], TEN)


def test_a_conversation_in_the_only_slot_is_named_instead_of_waited_for(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "lookahead": {"enabled": False}, "scheduler": {"max_sequences": 1}}
    with Engine.from_config(config) as engine:
        session = engine.open_session()
        assert list(engine.stream([1, 2], TEN, session=session))
        with pytest.raises(ResourceExhaustedError, match="^scheduler.max_sequences = 1: open conversations hold"):
            engine.generate([[1], [2]], TEN)
        engine.close_session(session)
        assert engine.generate([[1], [2]], TEN)


def test_a_loop_whose_slots_conversations_hold_waits_without_spinning(tiny_model):
    config = {"model": {"path": str(tiny_model)}, "lookahead": {"enabled": False}, "scheduler": {"max_sequences": 1}}
    outputs: Queue[StepOutput] = Queue()

    def finished() -> StepOutput:
        while (output := outputs.get(timeout=60)).finish_reason is None:
            pass
        return output

    with Engine.from_config(config) as engine, closing(EngineLoop(engine)) as loop:
        session = loop.open_session()
        loop.submit(engine.make_request([1, 2], TEN, session=session), outputs.put)
        assert finished().finish_reason is FinishReason.LENGTH
        loop.submit(engine.make_request([3], TEN), outputs.put)
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.5)
        assert outputs.empty() and time.process_time() - before < 0.25
        loop.submit(engine.make_request([4], TEN, session=session), outputs.put)  # the conversation goes on meanwhile
        assert finished().usage.num_prompt_tokens == 1
        loop.close_session(session)
        assert finished().finish_reason is FinishReason.LENGTH
