"""A language model exported with its speech tokens in the vocabulary: plain transformers gives the same answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.models.prompts import PromptStyle
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechLM
from palimpsest.models.tokens import SpeechTokenizer, as_frames, collapsed, read_tokens
from test_speech_tokens import D_ENC
from tiny import VOCAB, tiny_encoder, tiny_llama, tiny_speech_lm, tiny_tokenizer

N_TOKENS = 263  # of the tiny tokenizer: the embedding has 37 rows more
IDS = [[1, 1, 4, 4, 0], [2, 5, 5]]
STYLE = PromptStyle("Be brief.", "Answer what you hear.")


def saved(folder: Path, k: int, *, tied: bool = True, chat: bool = True, collapse: bool = True) -> SpeechLM:
    """A speech LLM of `k` codes, which are given as they are, and its processor, in a folder."""
    language_model = tiny_llama(5, tied=tied, eos_token_id=3)
    model = SpeechLM.from_parts(
        tiny_encoder(), language_model, reads="tokens", tokenizer=SpeechTokenizer(1, {}, codes=k), collapse=collapse
    ).eval()
    processor = processor_of(chat)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def processor_of(chat: bool = True) -> Any:
    processor = tiny_speech_lm()[1]
    return type(processor)(tiny_tokenizer(chat), processor.feature_extractor, 1, style=STYLE)


@pytest.mark.parametrize(("k", "tied"), [(8, True), (8, False), (60, True), (60, False)])
@pytest.mark.parametrize("chat", [True, False])
def test_it_answers_token_ids_as_the_speech_llm_answers_speech(tmp_path: Path, k: int, tied: bool, chat: bool) -> None:
    ours = saved(tmp_path / "it", k, tied=tied, chat=chat)
    export.export(tmp_path / "it", grown_llm=tmp_path / "grown", text_llm=tmp_path / "text")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert len(tokenizer) == N_TOKENS + k
    assert theirs.config.vocab_size == len(theirs.get_input_embeddings().weight) == max(VOCAB, N_TOKENS + k)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    new_ids = tokenizer.convert_tokens_to_ids([f"<|speech_{i}|>" for i in range(k)])
    assert new_ids == [*range(N_TOKENS, N_TOKENS + k)]
    assert torch.equal(theirs.get_input_embeddings().weight[new_ids], ours.adaptor.get_parameter("rows.weight"))
    if not tied:
        assert not theirs.lm_head.weight[new_ids].any()
    # The old rows, and the text LLM that was exported beside it, are the language model's.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text").state_dict()
    inside = ours.language_model.state_dict()
    assert all(torch.equal(plain[name], value) for name, value in inside.items())
    for name, value in theirs.state_dict().items():
        same = slice(N_TOKENS) if "embed" in name or "lm_head" in name else slice(None)
        assert torch.equal(value[same], inside[name][same]), name

    processor = processor_of(chat)
    for ids in IDS:
        said = "".join(f"<|speech_{i}|>" for i in collapsed(ids)[0]) + f"\n{STYLE.speech_instruction}"
        if chat:
            turns = [{"role": "system", "content": STYLE.system}, {"role": "user", "content": said}]
            prompt = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            prompt = tokenizer(f"{STYLE.system}\nQuestion: {said}\nAnswer:", return_tensors="pt")["input_ids"]
        spoken = torch.tensor([processor.speech_prompt(len(ids))])
        speech = {"encoder_frames": as_frames(ids)[None], "frame_counts": torch.tensor([len(ids)])}
        text = [int(it) for it in spoken[0] if it != SPEECH_POSITION]
        assert [int(it) for it in prompt[0] if it < N_TOKENS] == text
        with torch.no_grad():
            expected = ours(input_ids=spoken, **speech).logits[0, -1, :N_TOKENS]
            torch.testing.assert_close(theirs(prompt).logits[0, -1, :N_TOKENS], expected, rtol=0, atol=1e-4)
        greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        unsaid = {"suppress_tokens": [*range(N_TOKENS, max(VOCAB, N_TOKENS + k))]}  # rows that are no tokens of text
        answer = ours.generate(
            input_ids=spoken, attention_mask=torch.ones_like(spoken), **speech, **greedy,
            suppress_tokens=[*range(N_TOKENS, VOCAB)],
        )  # fmt: skip
        found = theirs.generate(prompt, **greedy, **unsaid)[0, prompt.shape[1] :]
        assert found.tolist() == answer[0].tolist()


def test_it_writes_no_speech_token(tmp_path: Path) -> None:
    """Tied, a row that lies along the last hidden state would be the likeliest token."""
    model = saved(tmp_path / "it", 8)
    prompt = torch.tensor([[1, 40, 60, 61]])
    with torch.no_grad():
        state = model.language_model.model(prompt).last_hidden_state[0, -1]
        model.adaptor.get_parameter("rows.weight")[3] = 100 * state
    model.save_pretrained(tmp_path / "it")
    export.export(tmp_path / "it", grown_llm=tmp_path / "grown")
    grown: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    greedy: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert int(grown(prompt).logits[0, -1].argmax()) == N_TOKENS + 3
        text = model.language_model(prompt).logits[0, -1]
    text[N_TOKENS : N_TOKENS + 8] = -torch.inf
    assert int(grown.generate(prompt, **greedy)[0, -1]) == int(text.argmax())


def test_what_makes_the_tokens_is_beside_it(tmp_path: Path) -> None:
    drawn = torch.randn(6, D_ENC, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    made = SpeechTokenizer(2, {"mean": torch.ones(D_ENC), "scale": torch.ones(D_ENC), "centroids": drawn})
    model = SpeechLM.from_parts(tiny_encoder(), tiny_llama(eos_token_id=3), reads="tokens", tokenizer=made)
    model.save_pretrained(tmp_path / "it")
    processor_of().save_pretrained(tmp_path / "it")
    export.export(tmp_path / "it", grown_llm=tmp_path / "grown")
    found = read_tokens(tmp_path / "grown/speech_tokenizer.safetensors")
    frames = torch.randn(1, 21, D_ENC, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.quantiser().ids(frames), made.quantiser().ids(frames))


@pytest.mark.parametrize("chat", [True, False])
def test_the_code_of_its_card_runs(tmp_path: Path, chat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "it", 8, chat=chat)
    export.export(tmp_path / "it", grown_llm=tmp_path / "grown")
    card = (tmp_path / "grown/README.md").read_text()
    assert "`<|speech_0|>` to `<|speech_7|>`, of equal ones in a row one, stand in front of the instruction" in card
    assert "library_name: transformers" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert "palimpsest" not in code
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(tmp_path / "grown"))), names)
    found = [it for it in names["prompt"]["input_ids"][0].tolist() if it >= N_TOKENS]
    assert found == [N_TOKENS + 1, N_TOKENS, N_TOKENS + 1]
    assert capsys.readouterr().out


def test_models_without_such_tokens_are_told(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    model.save_pretrained(tmp_path / "frames")
    processor.save_pretrained(tmp_path / "frames")
    with pytest.raises(UserError, match="reads no speech tokens, so its vocabulary would not grow; give --text-llm"):
        export.export(tmp_path / "frames", grown_llm=tmp_path / "grown")
    saved(tmp_path / "taken", 8)
    taken = processor_of()
    taken.tokenizer.add_tokens(["<|speech_1|>"], special_tokens=True)
    taken.save_pretrained(tmp_path / "taken")
    with pytest.raises(UserError, match=r"has a token <\|speech_1\|> already"):
        export.export(tmp_path / "taken", grown_llm=tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
