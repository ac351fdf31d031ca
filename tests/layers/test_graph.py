"""Graph attention: masks against PyTorch Geometric, edges against double loops, causality, padding, caches."""

import pytest
import torch
from torch.nn import functional as F

from layers import graph
from layers.graph import EDGES, Edges, GraphAttention, add_graph, list_near, list_of
from model import GPT, GPTConfig
from run.checkpoint import build_model

pytest.importorskip('torch_geometric')
pytestmark = pytest.mark.usefixtures('one_thread', 'seed')

EVERY = [*EDGES, 'window,topk', 'window,topk,same']
PLACES = ['after', 'attention']
KINDS = ['gat', 'gatv2']
SIZES = dict(block_size=12, vocab_size=5, n_layer=2, n_head=2, n_embd=16, bias=True)
GRAPH = dict(use_graph=True, graph_heads=2, graph_window=3, graph_topk=2)


def make(**settings):
    """A model whose weights are large enough that every path matters."""
    model = GPT(GPTConfig(**{**SIZES, **GRAPH, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def make_layer(**settings):
    layer = GraphAttention(GPTConfig(**{**SIZES, **GRAPH, **settings}))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return layer


def tokens(*shape):
    return torch.randint(SIZES['vocab_size'], shape)


class Given(Edges):
    """Edges that a test has drawn."""

    def __init__(self, mask):
        self.drawn = mask  # (B, T, T)

    def bias(self, x, cache=None):
        return torch.where(self.drawn, 0.0, -torch.inf).unsqueeze(1)

    def list(self, x):
        b, target, source = self.drawn.nonzero().t()
        return torch.stack((source, target)) + b * self.drawn.size(1)


def draw(B, T, p):
    """A random causal graph with self loops."""
    return (torch.rand(B, T, T) < p).tril() | torch.eye(T, dtype=torch.bool)


def run(layer, x, edges):
    """The output of a layer, and the gradients of a random sum of it to the input and to the parameters."""
    x = x.clone().requires_grad_()
    y = layer(x, edges=edges)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*layer.named_parameters())
    return dict(zip(('y', 'x', *names), (y, *torch.autograd.grad((y * weights).sum(), [x, *parameters]))))


# masks and lists


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('p', [0.0, 0.2, 1.0])
def test_mask_gives_what_the_edge_list_gives(monkeypatch, kind, place, bias, p):
    """Outputs and gradients of one set of parameters on random graphs; rows taken together, and a few at a time."""
    if p < 1:
        monkeypatch.setattr(graph, 'ROWS', 4)
        monkeypatch.setattr(graph, 'NUMBERS', 4 * 3 * 11 * 24)
    settings = dict(graph_kind=kind, graph_place=place, bias=bias, n_embd=24, graph_heads=3)
    dense, pyg = (make_layer(graph_backend=backend, **settings) for backend in ('dense', 'pyg'))
    pyg.load_state_dict(dense.state_dict())
    x, edges = torch.randn(3, 11, 24), Given(draw(3, 11, p))
    actual, expected = run(dense, x, edges), run(pyg, x, edges)
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f'{name}: {text}'
        )
    assert all(
        g.abs().max() > 1e-3 for name, g in actual.items() if p and not (kind == 'gatv2' and name == 'conv.lin_l.bias')
    )


def test_output_is_that_of_the_equations():
    """GAT by loops (arXiv 1710.10903, eq. 1 to 5), and GATv2 (arXiv 2105.14491, eq. 7)."""
    mask, x = draw(2, 6, 0.5), torch.randn(2, 6, 16)
    for kind in KINDS:
        layer = make_layer(graph_kind=kind, graph_place='attention', graph_backend='dense', graph_heads=4)
        conv, expected = layer.conv, torch.empty(2, 6, 16)
        for b in range(2):
            for i in range(6):
                for h in range(4):
                    sources, rows = mask[b, i].nonzero().flatten(), slice(4 * h, 4 * h + 4)
                    if kind == 'gat':
                        values = x[b] @ conv.lin.weight[rows].t()
                        scores = F.leaky_relu(
                            values[i] @ conv.att_dst[0, h] + values[sources] @ conv.att_src[0, h], 0.2
                        )
                    else:
                        values = x[b] @ conv.lin_l.weight[rows].t() + conv.lin_l.bias[rows]
                        target = x[b, i] @ conv.lin_r.weight[rows].t() + conv.lin_r.bias[rows]
                        scores = F.leaky_relu(target + values[sources], 0.2) @ conv.att[0, h]
                    expected[b, i, rows] = scores.softmax(0) @ values[sources] + conv.bias[rows]
        torch.testing.assert_close(layer(x, edges=Given(mask)), layer.c_proj(expected), atol=1e-5, rtol=1e-5)


def neighbours(kinds, ids, x, i, length, window, topk):
    """The sources of token i of one sequence."""
    if i >= length:
        return {i}
    cosine = F.cosine_similarity(x[[i]], x[:i], dim=-1)
    sources = {
        'causal': range(i),
        'window': range(max(0, i - window), i),
        'same': [j for j in range(i) if ids[j] == ids[i]],
        'topk': sorted(range(i), key=lambda j: -cosine[j])[:topk],
    }
    return {i}.union(*(sources[kind] for kind in kinds))


@pytest.mark.parametrize('kinds', EVERY)
@pytest.mark.parametrize('lengths', [None, [5, 9, 1]], ids=['full', 'padded'])
def test_edges_are_those_of_a_double_loop(kinds, lengths):
    config = GPTConfig(**SIZES, **GRAPH, graph_edges=kinds)
    ids, x = tokens(3, 9), torch.randn(3, 9, 16)
    expected = set()
    for b, length in enumerate(lengths or [9] * 3):
        for i in range(9):
            expected |= {(b, i, j) for j in neighbours(kinds.split(','), ids[b], x[b], i, length, 3, 2)}
    edges = Edges(config, ids, lengths=None if lengths is None else torch.tensor(lengths))
    assert set(map(tuple, edges.mask(x).expand(3, 9, 9).nonzero().tolist())) == expected
    listed = [(i // 9, i % 9, j % 9) for j, i in edges.list(x).t().tolist()]
    assert set(listed) == expected and len(listed) == len(expected)
    assert all(i // 9 == j // 9 for j, i in edges.list(x).t().tolist())


@pytest.mark.parametrize('window', [1, 3, 20])
def test_edges_of_fewer_tokens_are_the_beginning_of_the_list(window):
    edges, counts = list_near(12, window, torch.device('cpu'))
    for T in range(1, 13):
        expected = [[j, i] for i in range(T) for j in range(max(0, i - window), i + 1)]
        assert edges[:, : counts[T - 1]].t().tolist() == expected


@pytest.mark.parametrize('edges', ['window', 'causal'])
def test_the_list_is_as_long_as_the_text_asks_and_not_the_context(edges):
    config = GPTConfig(block_size=10**7, use_graph=True, graph_edges=edges, graph_window=3, graph_backend='pyg')
    for T in 1, 2, 5, 8, 9:
        found = Edges(config, torch.zeros(2, T, dtype=torch.long))
        assert found.shared_list.tolist() == list_of(found.shared, 2).tolist()


# the layer in a GPT


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('backend', ['dense', 'pyg'])
@pytest.mark.parametrize('edges', EVERY)
def test_no_token_sees_those_after_it(place, kind, backend, edges):
    """By gradient: exactly zero from every later position, and not zero from the token itself."""
    model = make(
        graph_place=place, graph_kind=kind, graph_backend=backend, graph_edges=edges, n_layer=1 + (place == 'attention')
    )
    leaves = []

    def leaf(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    model.transformer.drop.register_forward_hook(leaf)
    y = model.features(tokens(2, 9))
    for t in range(9):
        (grad,) = torch.autograd.grad(y[:, t].pow(2).sum(), leaves[0], retain_graph=True)
        reach = grad.abs().amax(-1)  # (B, T)
        assert (reach[:, t] > 1e-6).all() and (reach[:, t + 1 :] == 0).all()
        assert (reach[:, :t] > 1e-6).all() or (place == 'attention' and edges != 'causal')


@pytest.mark.parametrize('edges', EVERY)
def test_backends_agree_in_a_gpt(edges):
    for place, kind in zip(PLACES, KINDS):
        dense, pyg = (
            make(graph_place=place, graph_kind=kind, graph_backend=backend, graph_edges=edges)
            for backend in ('dense', 'pyg')
        )
        pyg.load_state_dict(dense.state_dict())
        idx, lengths = tokens(3, 10), torch.tensor([10, 4, 7])
        assert dense.transformer.h[0].get_submodule('graph' if place == 'after' else 'attn').dense
        for given in (None, lengths):
            torch.testing.assert_close(
                dense.features(idx, lengths=given), pyg.features(idx, lengths=given), atol=1e-4, rtol=1e-4
            )
        changed = (dense.features(idx, lengths=lengths) - dense.features(idx)).abs().amax(-1)  # (B, T)
        assert changed[torch.arange(10) >= lengths[:, None]].max() > 1e-3  # padding has no neighbours


@pytest.mark.parametrize('backend', ['dense', 'pyg'])
@pytest.mark.parametrize('edges', EVERY)
def test_a_sample_depends_on_nothing_but_itself(backend, edges):
    """Not on the others of its batch, and not on the padding behind it."""
    for place in PLACES:
        model, idx = make(graph_edges=edges, graph_place=place, graph_backend=backend), tokens(3, 10)
        lengths = torch.tensor([10, 1, 6])
        y = model.features(idx)
        padded = model.features(torch.where(torch.arange(10) < lengths[:, None], idx, 0), lengths=lengths)
        for b, n in enumerate(lengths):
            torch.testing.assert_close(y[[b]], model.features(idx[[b]]), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(padded[[b], :n], model.features(idx[[b], :n]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('edges', EVERY)
@pytest.mark.parametrize('kind', KINDS)
def test_greedy_with_the_cache_equals_greedy_without_it(monkeypatch, edges, kind):
    """From one token and from five, within the block and beyond it."""
    monkeypatch.setattr(graph, 'ROWS', 3)
    for place in PLACES:
        for T in (1, 5):
            model, idx = (
                make(graph_edges=edges, graph_kind=kind, graph_place=place, vocab_size=20, bias=False),
                tokens(3, T),
            )
            without = model.generate(idx, 15, temperature=0, use_cache=False)
            assert torch.equal(model.generate(idx, 15, temperature=0), without)
            assert len(without[:, T:].unique()) > 1
            caches, whole = model.new_caches(), without[:, :12]
            parts = [model.features(part, caches) for part in (whole[:, :4], *whole[:, 4:].split(1, 1))]
            torch.testing.assert_close(torch.cat(parts, 1), model.features(whole), atol=1e-4, rtol=1e-4)


def test_edges_matter():
    """Each kind of edges gives other features, and so do window and topk."""
    model, idx = make(graph_edges='causal', graph_backend='dense'), tokens(2, 12)
    seen = []
    settings = [dict(graph_edges=edges) for edges in EVERY] + [
        dict(graph_edges='window', graph_window=5),
        dict(graph_edges='topk', graph_topk=4),
    ]
    for changed in settings:
        other = GPT(GPTConfig(**{**SIZES, **GRAPH, **changed})).eval()
        other.load_state_dict(model.state_dict())
        seen.append(other.features(idx))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('backend', ['dense', 'pyg'])
def test_mixed_precision_stays_near(kind, backend):
    model, idx = make(graph_kind=kind, graph_backend=backend, graph_edges='window,same'), tokens(3, 13)
    x, y = idx[:, :-1], idx[:, 1:].contiguous()
    expected = model(x, y)[1]
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_equally_similar_tokens_stay_so_however_they_are_rounded():
    """Without position embeddings equal tokens can have equal inputs, of which a batch may round one otherwise."""
    config = GPTConfig(**SIZES, **{**GRAPH, 'graph_topk': 1}, graph_edges='topk')
    x = torch.randn(64, 1, 16).repeat(1, 12, 1)
    x[:, 3] *= 1 + 3e-7
    x[:, 5, 2] += 1e-6
    assert (Edges(config, tokens(64, 12)).mask(x) == torch.ones(12, 12, dtype=torch.bool).tril()).all()


def test_similar_tokens_at_half_precision_are_those_at_full_precision():
    config, x = GPTConfig(**SIZES, **GRAPH, graph_edges='topk'), 10 + torch.randn(4, 12, 16)
    expected = Edges(config, tokens(4, 12)).mask(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(Edges(config, tokens(4, 12)).mask(x), expected)


@pytest.mark.parametrize(
    'settings', [dict(), dict(graph_kind='gatv2'), dict(graph_edges='topk,same', graph_backend='dense')], ids=str
)
def test_masks_compile_in_one_piece(settings):
    torch.compiler.reset()
    model, idx = make(**settings), tokens(2, 12)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])


# weights


@pytest.mark.parametrize('place', PLACES)
def test_optimizer_moves_every_parameter(place):
    model, idx = (
        GPT(GPTConfig(**SIZES, **GRAPH, graph_place=place, graph_edges='window,topk', dropout=0.1)),
        tokens(4, 13),
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.0, 0.01, (0.9, 0.95), 'cpu')
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(idx[:, :-1], idx[:, 1:].contiguous())[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert losses[-1] < 0.95 * losses[0]


def test_dropout_acts_on_the_output():
    layer, x = make_layer(dropout=0.5), torch.randn(2, 8, 16)
    edges = Given(draw(2, 8, 0.5))
    dropped = layer(x, edges=edges) == 0
    assert 0.3 < dropped.float().mean() < 0.7 and not (layer.eval()(x, edges=edges) == 0).any()


@pytest.mark.parametrize(
    'settings', [dict(), dict(graph_kind='gatv2', graph_edges='window,same', graph_heads=4)], ids=str
)
def test_added_layers_leave_the_logits_as_they_are(settings):
    model, idx = GPT(GPTConfig(**SIZES)).eval(), tokens(3, 12)
    before, expected = {name: p.clone() for name, p in model.state_dict().items()}, model(idx, idx)[0]
    assert add_graph(model, **settings) is model
    assert torch.equal(model(idx, idx)[0], expected)
    assert all(torch.equal(model.state_dict()[name], p) for name, p in before.items())
    assert (
        model.config == GPTConfig(**{**SIZES, 'use_graph': True, **settings})
        and not model.transformer.h[0].graph.training
    )
    # the first step opens the gates, the next ones move what is behind them
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:].contiguous())[1].backward()
        optimizer.step()
    layer = model.transformer.h[1].graph
    assert layer.gate.any() and all(p.grad.any() for p in layer.parameters())
    assert not torch.equal(model(idx, idx)[0], expected)


def test_layers_are_added_once_and_behind_the_mlp_only():
    with pytest.raises(ValueError, match='a GPT without graph layers'):
        add_graph(GPT(GPTConfig(**SIZES)), graph_place='attention')
    for settings in dict(n_layer=3), dict(graph_head=2):
        with pytest.raises(ValueError, match=f'no settings of graph layers: {[*settings][0]}'):
            add_graph(GPT(GPTConfig(**SIZES)), **settings)
    with pytest.raises(ValueError, match='a GPT without graph layers'):
        add_graph(make())
    with pytest.raises(ValueError, match='graph_heads=3'):
        add_graph(GPT(GPTConfig(**SIZES)), graph_heads=3)
    for last in -1, SIZES['n_layer'] + 1:
        with pytest.raises(ValueError, match='last must lie between 0 and'):
            add_graph(GPT(GPTConfig(**SIZES)), last)


@pytest.mark.parametrize('place', PLACES)
def test_checkpoint_is_the_same_model(place):
    model, idx = make(graph_place=place, graph_edges='topk'), tokens(2, 12)
    rebuilt = build_model({'model': model.state_dict(), 'model_args': vars(model.config)}).eval()
    assert torch.equal(rebuilt(idx, idx)[0], model(idx, idx)[0])


def test_checkpoint_from_before_graph_attention_is_read():
    model, idx = GPT(GPTConfig(**SIZES)).eval(), tokens(2, 12)
    rebuilt = build_model({'model': model.state_dict(), 'model_args': dict(SIZES)}).eval()
    assert torch.equal(rebuilt(idx, idx)[0], model(idx, idx)[0]) and not rebuilt.config.use_graph


def test_initial_weights():
    model = GPT(GPTConfig(**{**SIZES, **GRAPH, 'n_embd': 96, 'graph_place': 'attention'}))
    block = model.transformer.h[1]
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)  # sqrt(2 * n_layer)
    assert block.attn.conv.lin.weight.std().item() == pytest.approx((2 / (96 + 96)) ** 0.5, rel=0.05)  # Glorot
    block = GPT(GPTConfig(**SIZES, **GRAPH)).transformer.h[1]
    assert not block.graph.gate.any() and not block.graph.conv.bias.any() and (block.ln_3.weight == 1).all()


def test_cropped_model_has_fewer_edges():
    model, idx = make(graph_edges='window'), tokens(2, 5)
    expected = model(idx, idx)[0]
    model.crop_block_size(5)
    torch.testing.assert_close(model(idx, idx)[0], expected)


# settings


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(graph_kind='gcn'), "graph_kind='gcn': expected gat or gatv2"),
        (dict(graph_place='before'), "graph_place='before': expected after or attention"),
        (dict(graph_backend='dgl'), "graph_backend='dgl': expected auto, dense or pyg"),
        (dict(graph_edges='windw'), "graph_edges='windw': expected any of causal, window, topk, same joined by commas"),
        (dict(graph_edges=''), 'expected any of causal'),
        (
            dict(graph_heads=3),
            'n_embd=16 is not divisible by graph_heads=3; nearest: n_embd=15 or 18, or graph_heads=2',
        ),
        (dict(graph_heads=0), 'graph_heads must be at least 1, got 0'),
        (dict(graph_window=0), 'graph_window must be at least 1, got 0'),
        (dict(graph_topk=-1), 'graph_topk must be at least 1, got -1'),
        (dict(graph_place='attention', use_kan=True, kan_targets='attn'), 'leaves no attention to make a KAN of'),
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **GRAPH, **settings})
    GPTConfig(**{**SIZES, **GRAPH, **settings, 'use_graph': False})


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torch_geometric', None)
    model, message = GPT(GPTConfig(**SIZES)), '^graph layers need PyTorch Geometric: pip install torch-geometric$'
    for attempt in make, lambda: add_graph(model), lambda: add_graph(model):  # which leaves the model as it was
        with pytest.raises(ValueError, match=message):
            attempt()
    assert model.config == GPTConfig(**SIZES)
