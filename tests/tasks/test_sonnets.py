"""Sonnets written on from their prompts, against plain enumeration and recomputed likelihoods."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from data.tokenizer import CharTokenizer
from layers.generation import sample_token
from model import GPT, GPTConfig
from tasks import sonnets
from tasks.sonnets import continue_lines, write_sonnet

pytestmark = pytest.mark.usefixtures('one_thread', 'seed')


class Tokenizer:
    """Tokens as GPT-2 has them: several line breaks in one, text after a line break, an end of text."""

    pieces = [b'a', b'\n', b'\n\n', b'\nb', b'c', b'<|endoftext|>']
    vocab_size, end_of_text = len(pieces), len(pieces) - 1

    def encode(self, text):
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode_bytes(self, ids):
        return b''.join(self.pieces[i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode()


class Few(Tokenizer):
    """Three tokens, so that all texts can be listed."""

    pieces = [b'a', b'\n', b'<|endoftext|>']
    vocab_size, end_of_text = 3, 2


A, BREAK, TWO_BREAKS, BREAK_B, C, END = range(6)


def make(vocab_size=6, block_size=16, std=0.6, **kwargs):
    """Two rows of the head beyond the vocabulary, as likely as the others: none may be drawn."""
    sizes = dict(n_layer=2, n_head=2, n_embd=16)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size + 2, **sizes, **kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=std)
    return model


def mean_log_probs(model, prompt, texts, vocab_size):
    """Of texts of the same length, in one pass and without a cache."""
    idx = torch.tensor([[*prompt, *ids] for ids in texts])
    with torch.no_grad():
        logits = model(idx, torch.zeros_like(idx))[0][:, len(prompt) - 1 : -1, :vocab_size].double()
    return logits.log_softmax(-1).gather(2, idx[:, len(prompt) :, None])[..., 0].mean(1).tolist()


def mean_log_prob(model, prompt, ids, vocab_size):
    return mean_log_probs(model, prompt, [ids], vocab_size)[0]


def has_ended(tokenizer, ids, n_lines, room):
    return tokenizer.end_of_text in ids or tokenizer.decode_bytes(ids).count(b'\n') >= n_lines or len(ids) == room


def cut(tokenizer, ids, n_lines, room):
    return next(ids[:n] for n in range(1, len(ids) + 1) if has_ended(tokenizer, ids[:n], n_lines, room))


class Script(nn.Module):
    """Says the tokens of a script, whatever it reads."""

    def __init__(self, script, block_size=64, vocab_size=6):
        super().__init__()
        self.script, self.config, self.vocab_size = script, SimpleNamespace(block_size=block_size), vocab_size
        self.anything = nn.Parameter(torch.zeros(1))

    def new_caches(self):
        return [SimpleNamespace(said=0)]

    def forward(self, idx, caches):
        logits = torch.zeros(len(idx), 1, self.vocab_size)
        logits[..., self.script[caches[0].said]] = 9.0
        caches[0].said += 1
        return logits, None


# where a text ends


@pytest.mark.parametrize(
    'script, n_lines, n_tokens',
    [
        ([A, BREAK, A, BREAK, A, BREAK], 2, 4),
        ([BREAK, BREAK, A], 2, 2),  # empty lines count
        ([A, TWO_BREAKS, A, BREAK], 2, 2),
        ([A, TWO_BREAKS, A, BREAK], 1, 2),
        ([A, BREAK_B, A, BREAK_B, A], 2, 4),
        ([A, BREAK, A, END, A, BREAK], 2, 4),
        ([END, A], 2, 1),
        ([A] * 80, 2, 61),  # the block is full
    ],
)
@pytest.mark.parametrize('sampling', [dict(temperature=0), dict(temperature=1e-3, best_of=3)])
def test_ends_at_the_line_at_the_end_of_text_or_with_the_block(script, n_lines, n_tokens, sampling):
    draft = continue_lines(Script(script), Tokenizer(), [A, A, A], n_lines, **sampling)
    assert draft.ids == tuple(script[:n_tokens])
    assert draft.score == pytest.approx(9 - math.log(math.exp(9) + 5), abs=1e-5)


def test_one_pass_of_the_model_for_each_token():
    model = Script([A, BREAK, A, BREAK])
    caches = model.new_caches()
    model.new_caches = lambda: caches
    continue_lines(model, Tokenizer(), [A], 1, temperature=0)
    assert caches[0].said == 2


@pytest.mark.parametrize('prompt', ['a\naa\na', 'a\naa\na\n'])
def test_sonnet_has_fourteen_lines(prompt):
    script = [*[A, BREAK] * 10, C, BREAK, A, BREAK]
    assert write_sonnet(Script(script), Tokenizer(), prompt, temperature=0) == 'a\naa\na' + '\na' * 10 + '\nc'
    script[19] = BREAK_B  # the tenth line ends, and 'b' is the eleventh
    assert write_sonnet(Script(script), Tokenizer(), prompt, temperature=0) == 'a\naa\na' + '\na' * 10 + '\nbc'
    script[21] = BREAK_B  # of what follows the last line nothing is left
    assert write_sonnet(Script(script), Tokenizer(), prompt, temperature=0) == 'a\naa\na' + '\na' * 10 + '\nbc'
    assert write_sonnet(Script([A, TWO_BREAKS, BREAK, END]), Tokenizer(), prompt, temperature=0) == 'a\naa\na\na'
    assert write_sonnet(Script([A] * 99, block_size=10), Tokenizer(), prompt, temperature=0) == 'a\naa\na\naaa'


def test_sonnet_of_a_model_by_character():
    tokenizer = CharTokenizer('\n abcd')
    text = write_sonnet(make(tokenizer.vocab_size, block_size=40), tokenizer, 'a b\nc d\nd', top_p=0.9)
    assert text.startswith('a b\nc d\nd\n') and len(text) <= 40 and text.count('\n') < 14
    with pytest.raises(ValueError, match="character 'x'"):
        write_sonnet(make(tokenizer.vocab_size), tokenizer, 'x')
    with pytest.raises(ValueError, match='the prompt has 14 lines'):
        write_sonnet(make(tokenizer.vocab_size), tokenizer, 'a\n' * 14)


# what is chosen


@pytest.mark.parametrize('sampling', [dict(temperature=0), dict(temperature=0.8, top_p=0.9), dict()], ids=str)
def test_a_single_text_is_that_of_generate(sampling):
    """For the same seed, up to where it ends."""
    tokenizer, lengths = Tokenizer(), set()
    for seed in range(8):
        model = make(std=0.3, use_kan=True, kan_hidden=1.0)
        torch.manual_seed(seed)
        generated = model.generate(torch.tensor([[A, C]]), 14, vocab_size=6, **sampling)[0, 2:].tolist()
        for n_lines in 1, 2, 30:
            torch.manual_seed(seed)
            draft = continue_lines(model, tokenizer, [A, C], n_lines, **sampling)
            assert list(draft.ids) == cut(tokenizer, generated, n_lines, 14)
            assert draft.score == pytest.approx(mean_log_prob(model, [A, C], draft.ids, 6), abs=1e-5)
            lengths.add(len(draft.ids))
    assert len(lengths) > 3


def test_best_of_keeps_the_likeliest_of_its_samples(monkeypatch):
    """The draws are noted: those of the drafts that go on, in one batch, at the temperature and top_p asked for."""
    tokenizer, draws, kept = Tokenizer(), [], set()

    def note(logits, temperature, top_p):
        tokens = sample_token(logits, temperature, top_p=top_p)
        draws.append((tokens[:, 0].tolist(), temperature, top_p))
        return tokens

    monkeypatch.setattr(sonnets, 'sample_token', note)
    for _ in range(12):
        model = make(std=0.3)
        draws.clear()
        draft = continue_lines(model, tokenizer, [A, C], 2, temperature=1.5, top_p=0.95, best_of=5)
        samples = [[] for _ in range(5)]
        for tokens, *sampling in draws:
            going_on = [sample for sample in samples if not sample or not has_ended(tokenizer, sample, 2, 14)]
            assert len(going_on) == len(tokens) and sampling == [1.5, 0.95]
            for sample, token in zip(going_on, tokens):
                sample.append(token)
        assert all(has_ended(tokenizer, sample, 2, 14) for sample in samples)
        scores = [mean_log_prob(model, [A, C], sample, 6) for sample in samples]
        best = max(range(5), key=lambda i: scores[i])
        assert list(draft.ids) == samples[best] and draft.score == pytest.approx(scores[best], abs=1e-5)
        kept.add(best)
    assert len(kept) > 2


def test_seed_decides():
    model, tokenizer = make(std=0.1), Tokenizer()
    texts = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        texts.append(continue_lines(model, tokenizer, [A], 3, best_of=3).ids)
    assert texts[0] == texts[1] != texts[2]


def all_texts(tokenizer, n_lines, room, ids=()):
    """Every text that has ended, and no text beyond one."""
    if ids and has_ended(tokenizer, ids, n_lines, room):
        return [ids]
    return [
        text for token in range(tokenizer.vocab_size) for text in all_texts(tokenizer, n_lines, room, (*ids, token))
    ]


@pytest.mark.parametrize('graph', [False, True])
def test_wide_beam_search_finds_the_best_of_all_texts(graph):
    tokenizer, found = Few(), set()
    for _ in range(8):
        model = make(3, block_size=6, std=0.4, use_graph=graph)
        texts = all_texts(tokenizer, 2, 4)
        scores = {}
        for length in {len(text) for text in texts}:
            group = [text for text in texts if len(text) == length]
            scores |= zip(group, mean_log_probs(model, [0, 0], group, 3))
        draft = continue_lines(model, tokenizer, [0, 0], 2, n_beams=3**4)
        assert draft.score == pytest.approx(max(scores.values()), abs=1e-5)
        assert draft.ids == max(scores, key=scores.get)
        narrow = continue_lines(model, tokenizer, [0, 0], 2, n_beams=2)
        assert narrow.score == pytest.approx(scores[narrow.ids], abs=1e-5) and narrow.score <= draft.score + 1e-5
        found.add(len(draft.ids))
    assert len(found) > 1


def plain_beam_search(model, tokenizer, prompt, n_lines, n_beams):
    """Every step from the beginning, without a cache."""
    room, live, ended = model.config.block_size - len(prompt), [()], {}
    while live:
        longer = [(*ids, token) for ids in live for token in range(tokenizer.vocab_size)]
        scores = dict(zip(longer, mean_log_probs(model, prompt, longer, tokenizer.vocab_size)))
        longer = sorted(scores, key=scores.get, reverse=True)[: n_beams - len(ended)]
        ended |= {ids: scores[ids] for ids in longer if has_ended(tokenizer, ids, n_lines, room)}
        live = [ids for ids in longer if ids not in ended]
    return max(ended, key=ended.get)


@pytest.mark.parametrize('n_beams', [2, 3, 5])
def test_narrow_beam_search_is_the_plain_one(n_beams):
    tokenizer = Tokenizer()
    for _ in range(20):
        model = make(block_size=10, std=0.15)
        draft = continue_lines(model, tokenizer, [A, C], 2, n_beams=n_beams)
        assert draft.ids == plain_beam_search(model, tokenizer, [A, C], 2, n_beams)
        assert draft.score == pytest.approx(mean_log_prob(model, [A, C], draft.ids, 6), abs=1e-5)


@pytest.mark.parametrize('sampling', [dict(n_beams=2), dict(best_of=2), dict(temperature=0)], ids=str)
def test_logits_that_are_no_numbers_write_nothing(sampling):
    model = make()
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(ValueError, match='the logits are not finite'):
        continue_lines(model, Tokenizer(), [A], 2, **sampling)


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(n_beams=2, best_of=2), 'n_beams=2 and best_of=2 exclude each other'),
        (dict(n_beams=0), 'got 1, 0 and 1'),
        (dict(best_of=-1), 'got 1, 1 and -1'),
        (dict(n_lines=0), 'got 0, 1 and 1'),
        (dict(temperature=-1), 'temperature >= 0'),
        (dict(top_p=2), 'top_p <= 1'),
        (dict(top_p=0, n_beams=2), 'top_p <= 1'),
        (dict(prompt_ids=[]), 'the prompt has 0 tokens, expected 1 to 15'),
        (dict(prompt_ids=[A] * 16), 'the prompt has 16 tokens'),
    ],
)
def test_bad_setting(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        continue_lines(make(), Tokenizer(), **{'prompt_ids': [A], 'n_lines': 1, **settings})
    assert '\n' not in str(error.value)
