import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpq_core.data.texts import DataError, calibration_windows, interleaved, load_texts
from dpq_core.recipe import TextDataset

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('role ' + m['role'] + ' is unknown') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} end {% endfor %}"
)
ROW = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]


def tokenizer(template=TEMPLATE, opens=True):
    """Of whole words; `opens`: it puts a begin-of-text token before each text."""
    words = ["<s>", "</s>", "<unk>", "user", "assistant", "end", "a", "b", "c"]
    vocabulary = {word: number for number, word in enumerate(words)}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens:
        whole.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


@pytest.fixture
def messages(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"said": row}) + "\n" for row in rows))
        return TextDataset(path="json", data_files=str(path), messages_column="said")

    return write


@pytest.mark.parametrize("opens", [True, False])
def test_the_model_s_own_template_writes_them_with_one_begin_of_text(messages, opens):
    reads = tokenizer(opens=opens)
    texts = load_texts(messages(ROW, ROW), reads)
    ids = reads.convert_tokens_to_ids(["<s>", *["user", "a", "b", "end", "assistant", "c", "end"]])
    assert reads(texts[0]).input_ids == ids
    stream = [*ids, reads.eos_token_id, *ids]  # the first text, its end, the second
    assert calibration_windows(texts, reads, 1, len(stream)).tolist() == [stream]


@pytest.mark.parametrize(
    ("rows", "reads", "said"),
    [
        ([ROW], tokenizer(template=None), "the model's tokenizer has no chat template"),
        ([ROW], None, "the model's tokenizer has no chat template"),
        (["a text"], tokenizer(), "row 0: not a list of messages, each with the texts 'role'"),
        ([ROW, [{"role": "user"}]], tokenizer(), "row 1: not a list of messages"),
        ([ROW, []], tokenizer(), "row 1: not a list of messages"),
        (
            [[{"role": "tool", "content": "a"}]],
            tokenizer(),
            "row 0: the chat template refuses it: role tool is unknown",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(messages, rows, reads, said):
    with pytest.raises(DataError, match=said) as raised:
        load_texts(messages(*rows), reads)
    assert "column 'said'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_beginning_holds_the_shares():
    many, few = torch.zeros(12, 2), torch.arange(1, 5)[:, None].expand(4, 2)
    mixed = interleaved([many, few])
    assert sorted(mixed[:, 0].tolist()) == [0] * 12 + [1, 2, 3, 4]
    assert [int((mixed[:n, 0] > 0).sum()) for n in (4, 8, 12, 16)] == [1, 2, 3, 4]
    assert torch.equal(interleaved([few]), few)
