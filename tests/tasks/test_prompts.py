"""The one prompt of each task, what is cut from it, what is held out, and batches, against plain Python."""

import hashlib
import json
import math
import os
import random
import re

import pytest
import torch

from data import course, loader
from data.tokenizer import CharTokenizer
from helpers import HEADERS
from tasks import prompts
from tasks.prompts import TASKS, Example, collate, encode_prompt, hold_out, make_batches, read_examples

LABELLED = [name for name, task in TASKS.items() if task.answers]
SONNET = '\n'.join(f'Line {i} of the sonnet,' for i in range(14))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'DATA', str(tmp_path))
    for name in TASKS:
        (tmp_path / name).mkdir()
    return tmp_path


def write_table(folder, name, split, texts, labelled=True):
    """One row for each text; a pair has the text and the same backwards."""
    texts = [(text,) if name != 'quora' else (text, text[::-1]) for text in texts]
    lines = ['\t'.join([str(i), f'{split}{i}', *parts, *['1'] * labelled]) for i, parts in enumerate(texts)]
    header = HEADERS[name] if labelled else HEADERS[name].rpartition('\t')[0] + '\n'
    (folder / name / f'{split}.csv').write_text(header + '\n'.join(lines) + '\n')


# tasks


@pytest.mark.parametrize('name', TASKS)
def test_task_reads_its_own_files(data, name):
    """Of test without labels; those of sonnets are None."""
    task = prompts.find_task(name)
    assert task.name == name and task.path('dev') == data / name / ('dev.csv' if task.answers else 'dev.txt')
    for split in 'dev', 'test':
        if task.answers:
            write_table(data, name, split, ['Good'], labelled=split != 'test')
        else:
            (data / name / f'{split}.txt').write_text(f'7\n\n{SONNET}\n')
        texts = {'sonnets': (SONNET,), 'quora': ('good', 'doog')}.get(name, ('good',))
        label = 1 if task.answers and split != 'test' else None
        assert task.read(split) == [('7' if name == 'sonnets' else f'{split}0', *texts, label)]


# prompts


@pytest.mark.parametrize('name', LABELLED)
def test_one_prompt_for_all_splits(data, gpt2, name):
    """But for the label. The text of the prompt is that of the file, in lower case."""
    texts = ['A fine <|endoftext|> film .', 'Dull', 'É " ?']
    for split in 'train', 'dev', 'test':
        write_table(data, name, split, texts, labelled=split != 'test')
    train, dev, test = (read_examples(name, split, gpt2, 1024) for split in ('train', 'dev', 'test'))
    assert [e.ids for e in train] == [e.ids for e in dev] == [e.ids for e in test]
    assert (
        [e.label for e in train] == [1] * 3
        and [e.label for e in test] == [None] * 3
        and [e.id for e in dev] == ['dev0', 'dev1', 'dev2']
    )
    assert gpt2.end_of_text not in sum([e.ids for e in train], [])
    texts = [text.lower() for text in texts]
    if name == 'quora':
        expected = [f'Question 1: {text}\nQuestion 2: {text[::-1]}\nThe same question:' for text in texts]
    else:
        expected = [f'{text}\nSentiment:' for text in texts]
    assert [gpt2.decode(e.ids) for e in train] == expected


def test_sonnets_are_whole_and_test_is_their_beginning(data, gpt2):
    for split in 'train', 'test':
        text = SONNET if split == 'train' else '\n'.join(SONNET.split('\n')[:3])
        (data / 'sonnets' / f'{split}.txt').write_text(f'Sonnets\n\n7\n\n{text}\n\n')
    (train,), (test,) = (read_examples('sonnets', split, gpt2, 1024) for split in ('train', 'test'))
    assert (train.id, train.text, train.label) == ('7', SONNET, None)
    assert train.ids[-1] == gpt2.end_of_text and gpt2.decode(train.ids[:-1]) == SONNET
    assert (
        prompts.prompt_of(train.text)
        == prompts.prompt_of(test.text)
        == 'Line 0 of the sonnet,\nLine 1 of the sonnet,\nLine 2 of the sonnet,\n'
    )


@pytest.mark.parametrize('name', LABELLED)
def test_answers_are_single_tokens_that_go_on_from_the_prompt(gpt2, name):
    task = TASKS[name]
    ids = prompts.answer_ids(task, gpt2)
    assert len(set(ids)) == len(task.answers) == course.COLUMNS[name][2]
    for i, answer in zip(ids, task.answers):
        assert gpt2.encode(task.question + answer) == [*gpt2.encode(task.question), i]


def test_words_of_labels_are_in_the_order_of_the_course():
    """From the worst to the best, and 1 where two questions are the same."""
    assert TASKS['sst'].answers == (' terrible', ' bad', ' okay', ' good', ' great')
    assert TASKS['cfimdb'].answers == (' bad', ' good') and TASKS['quora'].answers == (' no', ' yes')


def test_of_several_tokens_the_first_is_the_answer_if_it_tells_them_apart(gpt2, capsys):
    def task(*answers):
        return prompts.Task('sst', ('',), '\nSentiment:', answers, '')

    assert prompts.answer_ids(task(' good', ' indescribable!'), gpt2) == [gpt2.encode(' good')[0], 773]
    assert gpt2.decode([773]) == ' ind'
    assert capsys.readouterr().err == "sst: the first token stands for the label of ' indescribable!'\n"
    same = task(' indescribable!', ' indescribable?')
    with pytest.raises(ValueError, match="' indescribable!', ' indescribable\\?' have no first token of their own"):
        prompts.answer_ids(same, gpt2)


def test_shots_are_answered_prompts_before_the_prompt(gpt2, data, capsys):
    write_table(data, 'quora', 'train', ['one', 'two', 'three'])
    write_table(data, 'quora', 'dev', ['four'])
    shots = prompts.encode_shots('quora', gpt2, 2, seed=1)
    (plain,) = prompts.read_examples('quora', 'dev', gpt2, 99)
    (shown,) = prompts.read_examples('quora', 'dev', gpt2, 99, shots)
    text, alone = gpt2.decode(shown.ids), gpt2.decode(plain.ids)
    parts = text.split('\n\n')
    assert len(parts) == 3 and parts[2] == alone and shown.ids[: len(shots)] == shots
    for part in parts[:2]:
        assert re.fullmatch(r'Question 1: .*\nQuestion 2: .*\nThe same question: yes', part)  # the label of all of them
    assert {part.split()[2] for part in parts[:2]} <= {'one', 'two', 'three'} and parts[0] != parts[1]
    assert prompts.encode_shots('quora', gpt2, 2, seed=1) == shots
    (cut,) = prompts.read_examples('quora', 'dev', gpt2, len(shown.ids) - 1, shots)
    assert gpt2.decode(cut.ids).startswith(gpt2.decode(shots)) and len(cut.ids) == len(shown.ids) - 1
    capsys.readouterr()
    prompts.encode_shots('quora', gpt2, 2, seed=1, longest=16)
    assert re.fullmatch('1 of 2 shots of quora are cut to 16 tokens\n', capsys.readouterr().err)
    with pytest.raises(ValueError, match='4 shots of quora are more than the 3 examples of train'):
        prompts.encode_shots('quora', gpt2, 4, seed=1)
    with pytest.raises(ValueError, match='shots are answered examples, and sonnets has no answers'):
        prompts.encode_shots('sonnets', gpt2, 1, seed=1)


def test_some_are_drawn_the_same_way_each_time_and_from_all_parts():
    examples = [*range(1000)]
    drawn = prompts.draw_some(examples, 100)
    assert drawn == prompts.draw_some(examples, 100) == sorted(set(drawn)) and len(drawn) == 100
    assert 30 < sum(i < 500 for i in drawn) < 70
    assert all(prompts.draw_some(examples, n) == examples for n in (0, 1000, 2000))


def test_shots_are_of_every_label():
    rows = [(str(i), f'text {i}', i % 3 if i < 30 else 0) for i in range(100)]
    drawn = [prompts.draw_evenly(rows, 6, random.Random(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for shots in drawn:
        assert sorted(row[-1] for row in shots) == [0, 0, 1, 1, 2, 2] and len(set(shots)) == 6
    assert any([row[-1] for row in shots] != [0, 0, 1, 1, 2, 2] for shots in drawn)
    assert len(set(prompts.draw_evenly(rows, 100, random.Random(1)))) == 100


# what does not fit


def cut(parts, room):
    """A token at a time from the end of the longest part, or of all that are as long."""
    while sum(map(len, parts)) > room:
        parts = [part[:-1] if len(part) == max(map(len, parts)) else part for part in parts]
    return parts


@pytest.mark.parametrize('name', LABELLED)
def test_cutting_keeps_the_question_and_the_block(gpt2, name):
    task, draw = TASKS[name], random.Random(0)
    befores, question = [gpt2.encode(text) for text in task.before], gpt2.encode(task.question)
    n_fixed = len(question) + sum(map(len, befores))
    for _ in range(200):
        sentences = [
            ' '.join(draw.choices(['good', 'incomprehensible', 'film'], k=draw.randint(1, 12))) for _ in task.before
        ]
        parts = [gpt2.encode_ordinary(' ' * (name == 'quora') + sentence) for sentence in sentences]
        block_size = n_fixed + draw.randint(len(parts), 40)
        ids, was_cut = encode_prompt(task, sentences, gpt2, block_size)
        assert was_cut == (n_fixed + sum(map(len, parts)) > block_size)
        assert ids[-len(question) :] == question and len(ids) <= block_size
        kept = cut(parts, block_size - n_fixed)
        assert ids == [i for before, part in zip(befores, kept) for i in before + part] + question


@pytest.mark.parametrize('name', LABELLED)
def test_block_without_room_is_refused_in_one_line(gpt2, name):
    """The tokens that the message counts, and one for each sentence, are the least that there has to be."""
    task = TASKS[name]
    sentences = ['film'] * len(task.before)
    with pytest.raises(
        ValueError, match=f'block_size=3 has no room for the prompt of {name}: it takes [0-9]+ tokens beside'
    ) as error:
        encode_prompt(task, sentences, gpt2, 3)
    assert '\n' not in str(error.value)
    least = int(str(error.value).split()[-5]) + len(sentences)
    assert len(encode_prompt(task, sentences, gpt2, least)[0]) == least
    with pytest.raises(ValueError, match=f'block_size={least - 1} has no room'):
        encode_prompt(task, sentences, gpt2, least - 1)
    with pytest.raises(ValueError, match='tokens beside the text, 50 of them for the shots: give fewer$'):
        encode_prompt(task, sentences, gpt2, least + 10, shots=[0] * 50)


@pytest.mark.parametrize('name', ['sst', 'quora'])
def test_texts_that_are_cut_are_counted_in_one_line(data, gpt2, capsys, name):
    write_table(data, name, 'train', ['film ' * 60, 'film', 'film ' * 70])
    examples = read_examples(name, 'train', gpt2, 40)
    assert capsys.readouterr().err == f'train.csv of {name}: 2 of 3 texts are cut to fit into block_size=40\n'
    assert max(len(e.ids) for e in examples) <= 40
    read_examples(name, 'train', gpt2, 1024)
    assert capsys.readouterr().err == ''


def test_sonnets_are_cut_behind_the_last_target(data, gpt2, capsys):
    (data / 'sonnets' / 'train.txt').write_text(f'1\n\n{SONNET}\n')
    whole = read_examples('sonnets', 'train', gpt2, 1024)[0].ids
    n = len(whole)
    assert capsys.readouterr().err == ''
    assert read_examples('sonnets', 'train', gpt2, n - 1)[0].ids == whole  # the last token is no input
    assert capsys.readouterr().err == ''
    assert read_examples('sonnets', 'train', gpt2, n - 2)[0].ids == whole[:-1]
    assert capsys.readouterr().err == f'train.txt of sonnets: 1 of 1 texts are cut to fit into block_size={n - 2}\n'


def test_sonnet_whose_prompt_does_not_fit_is_refused(data, gpt2):
    (data / 'sonnets' / 'dev.txt').write_text(f'1\n\n{SONNET}\n')
    n = len(gpt2.encode(prompts.prompt_of(SONNET)))
    assert len(read_examples('sonnets', 'dev', gpt2, n + 1)[0].ids) == n + 2
    with pytest.raises(
        ValueError, match=f'block_size={n} has no room for a sonnet: its first 3 lines take {n} tokens$'
    ):
        read_examples('sonnets', 'dev', gpt2, n)


# what cannot be read


@pytest.mark.parametrize('call', [lambda: prompts.find_task('imdb'), lambda: read_examples('imdb', 'train', None, 8)])
def test_unknown_task(call):
    with pytest.raises(ValueError, match="^task='imdb': expected one of sst, cfimdb, quora, sonnets$"):
        call()


@pytest.mark.parametrize('name', TASKS)
def test_files_that_are_not_there(data, name):
    with pytest.raises(
        ValueError, match=rf'{name}/dev.* is not there: python data/{name}/prepare.py writes it$'
    ) as error:
        read_examples(name, 'dev', None, 8)
    assert '\n' not in str(error.value)


def test_a_file_that_is_not_what_was_prepared(data):
    write_table(data, 'sst', 'train', ['abc'])
    content = (data / 'sst' / 'train.csv').read_bytes()
    about = dict(splits=dict(train=dict(sha256=hashlib.sha256(content).hexdigest())))
    (data / 'sst' / 'meta.json').write_text(json.dumps(about))
    course.check_file(data / 'sst' / 'train.csv')
    (data / 'sst' / 'train.csv').write_bytes(content[:-1])
    with pytest.raises(ValueError, match='train.csv does not match its checksum in meta.json: prepare the data set'):
        read_examples('sst', 'train', None, 8)


def test_missing_data_is_prepared_once(data, capfd):
    script = data / 'sst' / 'prepare.py'
    script.write_text('raise SystemExit("no network")')
    with pytest.raises(
        ValueError,
        match="preparing data set 'sst' failed, see above; python .*prepare.py --source=... takes files of your own$",
    ):
        prompts.prepare_task('sst')
    assert capfd.readouterr().err == 'no network\n'
    script.write_text('from pathlib import Path; print("run"); Path(__file__).with_name("meta.json").write_text("{}")')
    for _ in range(2):
        prompts.prepare_task('sst')
    said, *rest = capfd.readouterr().out.splitlines()
    assert said == f"data set 'sst' is missing, preparing it: python {os.path.relpath(script)}" and rest == ['run']
    with pytest.raises(ValueError, match="task='imdb': expected one of"):
        prompts.prepare_task('imdb')


@pytest.mark.parametrize('name', TASKS)
def test_vocabulary_by_character_is_refused(data, name):
    if TASKS[name].answers:
        write_table(data, name, 'train', ['abc'])
    else:
        (data / name / 'train.txt').write_text(f'1\n{SONNET}\n')
    tokenizer = CharTokenizer('abc')
    with pytest.raises(
        ValueError,
        match=f'{name} is English text: it wants the tokens of GPT-2 or of a model of transformers, not a vocab',
    ) as error:
        read_examples(name, 'train', tokenizer, 64)
    assert '\n' not in str(error.value)


# what is held out, and batches


def draw_examples(n, seed=0):
    draw = random.Random(seed)
    return [Example(str(i), [draw.randrange(100) for _ in range(draw.randint(1, 60))], i % 2) for i in range(n)]


def same(examples, others):
    return [e.id for e in examples] == [e.id for e in others]


@pytest.mark.parametrize('n, fraction, n_held', [(50, 0.1, 5), (50, 0.5, 25), (3, 0.1, 1), (2, 0.0, 1)])
def test_the_same_examples_are_held_out_whatever_the_seed(n, fraction, n_held):
    examples, splits = draw_examples(n), []
    for seed in 0, 1:
        random.seed(seed), torch.manual_seed(seed)
        splits.append(hold_out(examples, fraction))
    (train, held), (train_again, held_again) = splits
    assert same(train, train_again) and same(held, held_again)
    assert len(held) == n_held and sorted(e.id for e in train + held) == sorted(e.id for e in examples)
    assert same(examples, draw_examples(n))  # and nothing is shuffled in place


def test_held_out_examples_are_of_all_parts_of_the_file():
    _, held = hold_out(draw_examples(1000), 0.2)
    assert all(30 <= sum(int(e.id) // 250 == part for e in held) <= 70 for part in range(4))


@pytest.mark.parametrize('n, fraction', [(1, 0.1), (5, 0.95)])
def test_nothing_left_to_learn_from(n, fraction):
    with pytest.raises(ValueError, match=f'valid_fraction={fraction} of {n} examples leaves none to learn from'):
        hold_out(draw_examples(n), fraction)


@pytest.mark.parametrize('n, batch_size', [(1, 4), (64, 8), (333, 7), (5, 8), (41, 2), (0, 8)])
@pytest.mark.parametrize('seed', [None, '1337 0'])
def test_batches_are_a_permutation(n, batch_size, seed):
    """Full ones but for one: the number of steps of an epoch rests on it."""
    examples = draw_examples(n)
    batches = make_batches(examples, batch_size, seed)
    assert sorted(e.id for batch in batches for e in batch) == sorted(e.id for e in examples)
    assert len(batches) == math.ceil(n / batch_size)
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    assert same(examples, draw_examples(n))


def test_batches_are_a_pure_function_of_the_seed():
    examples, found = draw_examples(300), []
    for state, seed in enumerate(['1337 0', '1337 0', '1337 1', '1338 0']):
        random.seed(state)
        before = random.getstate()
        found.append([[e.id for e in batch] for batch in make_batches(examples, 8, seed)])
        assert random.getstate() == before
    assert found[0] == found[1] and found[0] != found[2] != found[3] != found[0]
    assert {frozenset(batch) for batch in found[0]} != {
        frozenset(batch) for batch in found[2]
    }  # other mates, not another order alone


def padding(batches):
    return sum(len(batch) * max(len(e.ids) for e in batch) - sum(len(e.ids) for e in batch) for batch in batches)


def test_batches_are_of_like_lengths():
    examples = draw_examples(800)
    plain = [examples[i : i + 8] for i in range(0, 800, 8)]
    assert padding(make_batches(examples, 8, seed=1)) < padding(plain) / 5
    batches = make_batches(examples, 8)
    lengths = [len(e.ids) for batch in batches for e in batch]
    assert lengths == sorted(lengths)
    shuffled = [len(batch[0].ids) for batch in make_batches(examples, 8, seed=1)]
    assert sum(a < b for a, b in zip(shuffled, shuffled[1:])) < 70  # but in no order of length


def test_collate_pads_on_the_right():
    batch = [Example('a', [5, 6, 7], 1), Example('b', [8], None), Example('c', [9, 10], 0)]
    idx, lengths, targets = collate(batch, 'cpu')
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]] and lengths.tolist() == [3, 1, 2]
    assert targets.tolist() == [1, -1, 0] and idx.dtype == lengths.dtype == targets.dtype == torch.int64


def test_collate_of_sonnets_has_the_next_tokens_as_targets():
    batch = [Example('a', [5, 6, 7, 8], text='x'), Example('b', [8, 9], text='y')]
    idx, lengths, targets = collate(batch, 'cpu')
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0]] and lengths.tolist() == [3, 1]
    assert targets.tolist() == [[6, 7, 8], [9, -1, -1]]
