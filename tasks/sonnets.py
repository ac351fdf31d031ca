"""Sonnets written on from their first lines: by sampling, the best of several, or beam search."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data.course import N_LINES
from layers.generation import check_finite, packed_weights, sample_token


@dataclass
class Draft:
    """What may follow a prompt: its tokens, the sum of their log-probabilities, how many line breaks they hold."""

    ids: tuple = ()
    log_prob: float = 0.0
    n_lines: int = 0
    row: int = 0  # of the batch, in which all but the last of its tokens have been

    @property
    def score(self):
        """The mean log-probability of a token, under the model as it is."""
        return self.log_prob / len(self.ids)


@torch.no_grad()
def continue_lines(model, tokenizer, prompt_ids, n_lines, temperature=1.0, top_p=None, n_beams=1, best_of=1):
    """The Draft that follows the token ids of a prompt. It ends with the token that ends its n_lines-th line (a line
    may be empty, and that token may hold more), with `tokenizer.end_of_text` where the tokenizer has one, or where
    prompt and draft fill the block_size of the model. Nothing beyond counts towards its score. Wants model.eval().

    temperature, top_p  as in sample_token; temperature 0 takes the most likely token
    best_of             draw so many at once and keep the one of the highest score
    n_beams             more than 1: beam search, which draws nothing and has no use for temperature and top_p. Each
                        step keeps the most likely drafts, n_beams less those that have ended; of the ended ones the
                        highest score wins

    ValueError for a prompt that is empty or leaves no room, for settings out of range, and for n_beams with best_of.
    """
    check_sampling(model, prompt_ids, n_lines, temperature, top_p, n_beams, best_of)
    room, end_of_text = model.config.block_size - len(prompt_ids), tokenizer.end_of_text
    device = next(model.parameters()).device

    def has_ended(draft):
        return draft.n_lines >= n_lines or len(draft.ids) >= room or draft.ids[-1] == end_of_text

    drafts, ended, caches = [Draft() for _ in range(best_of)], [], model.new_caches()
    fresh = torch.tensor([prompt_ids] * best_of, device=device)  # (B, T), from then on (B, 1)
    with packed_weights(model):
        while drafts:
            logits = model(fresh, caches=caches)[0][:, -1, : tokenizer.vocab_size]  # (B, V)
            log_probs = F.log_softmax(logits.float(), dim=-1)
            if n_beams > 1:
                rows, tokens = grow_beams(drafts, log_probs, n_beams - len(ended))
            else:
                rows, tokens = list(range(len(drafts))), sample_token(logits, temperature, top_p=top_p)[:, 0].tolist()
            steps = zip(rows, tokens, log_probs[rows, tokens].tolist())
            longer = [extend(drafts[row], token, log_prob, row, tokenizer) for row, token, log_prob in steps]
            ended += [draft for draft in longer if has_ended(draft)]
            drafts = [draft for draft in longer if not has_ended(draft)]
            kept = [draft.row for draft in drafts]
            if kept and kept != list(range(len(fresh))):
                for cache in caches:
                    cache.select(kept)
            fresh = torch.tensor([draft.ids[-1:] for draft in drafts], device=device)
    return max(ended, key=lambda draft: draft.score)


def check_sampling(model, prompt_ids, n_lines, temperature, top_p, n_beams, best_of):
    if min(n_lines, n_beams, best_of) < 1:
        raise ValueError(f'expected n_lines, n_beams and best_of of at least 1, got {n_lines}, {n_beams} and {best_of}')
    if n_beams > 1 and best_of > 1:
        raise ValueError(f'n_beams={n_beams} and best_of={best_of} exclude each other: one of them has to be 1')
    n, most = len(prompt_ids), model.config.block_size - 1
    if not 0 < n <= most:
        raise ValueError(f'the prompt has {n} tokens, expected 1 to {most}: block_size less one')
    if n_beams > 1:
        sample_token(torch.zeros(1, 1), temperature, top_p=top_p)  # not used, but checked all the same


def grow_beams(drafts, log_probs, n):
    """The n most likely drafts a token longer, by log_probs (B, V): the rows they go on from, and the tokens."""
    check_finite(log_probs)
    so_far = torch.tensor([[draft.log_prob] for draft in drafts], device=log_probs.device)
    totals = (so_far + log_probs).flatten()  # (B * V,)
    best = totals.topk(min(n, len(totals))).indices.tolist()
    return [i // log_probs.size(1) for i in best], [i % log_probs.size(1) for i in best]


def extend(draft, token, log_prob, row, tokenizer):
    n_breaks = tokenizer.decode_bytes([token]).count(b'\n')  # a token may hold several, and more after them
    return Draft((*draft.ids, token), draft.log_prob + log_prob, draft.n_lines + n_breaks, row)


def write_sonnet(model, tokenizer, prompt, **sampling):
    """A sonnet that begins with the lines of `prompt`: 14 at most, none empty at the end. `sampling` as above."""
    prompt = prompt.rstrip('\n') + '\n'
    n_given = prompt.count('\n')
    if n_given >= N_LINES:
        raise ValueError(f'the prompt has {n_given} lines, a whole sonnet has {N_LINES}')
    prompt_ids = tokenizer.encode(prompt)
    draft = continue_lines(model, tokenizer, prompt_ids, N_LINES - n_given, **sampling)
    ids = [i for i in draft.ids if i != tokenizer.end_of_text]
    # a tokenizer may write tokens otherwise where none are before them
    text = prompt + tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
    return '\n'.join(text.split('\n')[:N_LINES]).rstrip()
