"""The page of learned functions: what is put into it, and how it behaves in a browser."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest

from inside.page import write_page

CHROMIUM, NODE = shutil.which('chromium'), shutil.which('node')
OFFLINE = 'disable-quic disable-background-networking disable-component-update disable-sync'
FLAGS = f'headless no-sandbox disable-gpu no-first-run {OFFLINE} allow-file-access-from-files enable-logging=stderr v=0'
HOSTILE = '</script><script>alert(1)</script><!--<script>&amp;<b>'
FAMILIES = ['tanh', 'affine', 'x^2', HOSTILE]

DRIVER = """<!doctype html>
<iframe src="page.html" style="width: 360px; height: 800px"></iframe>
<iframe src="page.html#edge=2-5" style="width: 1200px; height: 800px"></iframe>
<pre></pre>
<script>
const pause = () => new Promise(done => setTimeout(done, 300));
const texts = elements => [...elements].map(element => element.textContent);
function widths(page) {
  return [page.documentElement.scrollWidth, ...[...page.querySelectorAll('#list, svg, button')].map(
    element => element.getBoundingClientRect().right)];
}
function smallTexts(page, view) {
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const small = element => own(element) && parseFloat(view.getComputedStyle(element).fontSize) < 14;
  return [...page.querySelectorAll('main *')].filter(small).map(element => element.outerHTML);
}
function smallTargets(page) {
  const targets = [...page.querySelectorAll('button, select, summary, tr, label, input:not([type=checkbox])')];
  const sized = targets.map(element => [element.getBoundingClientRect(), element.outerHTML]);
  return sized.filter(([{ width, height }]) => width > 0 && (width < 40 || height < 40)).map(([, text]) => text);
}
async function drive(page, view) {
  const seen = {}, byId = id => page.getElementById(id), rows = () => texts(page.querySelectorAll('#rows .name'));
  const set = (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new view.Event('input', { bubbles: true }));
    return rows().length;
  };
  const press = key => page.body.dispatchEvent(new view.KeyboardEvent('keydown', { key, bubbles: true }));
  const sort = column => {
    page.querySelector(`[data-column=${column}] button`).click();
    return [page.querySelector(`[data-column=${column}]`).ariaSort, rows()];
  };
  const chosen = () => [byId('edge').textContent, ...texts(page.querySelectorAll('[aria-current] .name'))];
  seen.linked = chosen();
  seen.right = byId('plot').getBoundingClientRect().left > byId('list').getBoundingClientRect().right;
  seen.family = set('family', 'tanh'); set('family', '');
  seen.activity = set('activity', '50'); set('activity', '0');
  seen.r2 = set('r2-from', '0.9'); set('r2-from', '');
  seen.feature = set('feature', '2');
  seen.edge = set('neuron', '5');
  page.querySelector('[type=reset]').click(); await pause();
  seen.cleared = rows().length;
  byId('curved').click(); seen.curved = rows().length; byId('curved').click();
  seen.best = sort('r2'); seen.worst = sort('r2'); seen.places = sort('edge');
  press('ArrowDown'); press('ArrowDown'); press('ArrowUp'); await pause();
  seen.walked = chosen(); seen.hash = view.location.hash;
  page.querySelectorAll('#tiles button')[3].click(); seen.tile = chosen();
  byId('next').click(); seen.tiles = texts(page.querySelectorAll('#tiles .name'));
  seen.range = byId('range').textContent;
  page.querySelector('[value=spline]').click(); seen.spline = page.querySelectorAll('#plot .spline').length;
  page.querySelector('[value="h.1.mlp.layers.0"]').click(); seen.other = chosen();
  view.location.hash = '#layer=lm_head&edge=2-5'; await pause(); seen.followed = chosen();
  seen.select = byId('layer-select').value;
  return seen;
}
addEventListener('load', async () => {
  const [phone, desk] = [...document.querySelectorAll('iframe')].map(frame => frame.contentWindow);
  phone.document.getElementById('filters').open = true;
  const seen = { widths: widths(phone.document), wide: widths(desk.document),
    texts: smallTexts(phone.document, phone), targets: smallTargets(phone.document),
    drawn: phone.document.querySelectorAll('#plot .total').length, ...await drive(desk.document, desk) };
  document.querySelector('pre').textContent = JSON.stringify(seen);
});
</script>
"""


def edge_between(k):
    """The k-th strongest edge of a made-up layer; the last one is constant and has no formula."""
    x = [-2 + 5 * n / 63 for n in range(64)]
    base = [0.3 * v / (1 + math.exp(-v)) for v in x]
    total = [b + math.sin(v + k) / (k + 1) for b, v in zip(base, x)]
    last = k == 29
    return dict(
        i=k % 3,
        o=k,
        activity=1 / (k + 1),
        share=0.1 / (k + 1),
        affine_r2=None if last else 0.5,
        r2=None if last else 1 - 0.01 * k,
        family='constant' if last else FAMILIES[k % 4],
        formula='0.0312' if last else f'{k}*tanh(x) + {HOSTILE}',
        others=[] if last else [['gaussian', 0.991], [HOSTILE, 0.98]],
        roughness=1.7,
        total=[0.0312] * 64 if last else total,
        base=[0.0] * 64 if last else base,
        fit=None if last else [0.9 * v for v in total],
    )


def layer_called(name):
    feature = dict(low=-2.0, high=3.0, knots=[-2.2 + 0.4 * n for n in range(12)], grid=[-1.0, 1.0])
    inputs = {str(i): dict(feature, counts=[n * (40 - n) for n in range(40)]) for i in range(3)}
    layer = dict(name=name, features=3, outputs=30, edges_total=1234, grid_size=5, spline_order=3, activation='SiLU()')
    summary = dict(affine=0.93, outside=0.12, random_affine=None)
    return dict(layer, summary=summary, inputs=inputs, edges=[edge_between(k) for k in range(30)])


@pytest.fixture
def report():
    layers = [layer_called(name) for name in ['h.0.mlp.layers.0', 'h.1.mlp.layers.0', 'lm_head']]
    return dict(model=HOSTILE, about=f'2.22M parameters {HOSTILE}', layers=layers)


def page_of(report, folder):
    write_page(folder / 'page.html', report)
    return (folder / 'page.html').read_text(encoding='utf-8')


def embedded_in(page):
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1])


def dump(url, folder):
    """The page at `url` after its scripts ran, and what they said to the console."""
    flags = [f'--{flag}' for flag in [*FLAGS.split(), f'user-data-dir={folder / "profile"}']]
    command = [CHROMIUM, *flags, '--window-size=1280,900', '--virtual-time-budget=10000', '--dump-dom', url]
    done = subprocess.run(command, capture_output=True, encoding='utf-8', timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason='no chromium to open the page in')


def test_report_is_read_back(report, tmp_path):
    assert embedded_in(page_of(report, tmp_path)) == report
    assert [path.name for path in tmp_path.iterdir()] == ['page.html']


def test_page_takes_text_of_any_kind(tmp_path):
    for text in [HOSTILE, '<!--', '{{report}}', '\\', '\u2028 “é” \U0001f600', '']:
        report = dict(model=text, about=text, layers=[])
        assert embedded_in(page_of(report, tmp_path)) == report


def test_hostile_text_cannot_end_the_script(report, tmp_path):
    plain, hostile = [page_of(dict(report, model=name), tmp_path) for name in ['plain', HOSTILE]]
    assert all(hostile.count(tag) == plain.count(tag) for tag in ['<', '<script', '</script', '<!--'])
    assert not re.search(r'innerHTML|insertAdjacentHTML|document\.write|\beval\b', plain)


def test_page_needs_no_network(tmp_path):
    page = page_of(dict(model='m', about='a', layers=[]), tmp_path)
    assert re.findall(r'http\S*', page) == ["http://www.w3.org/2000/svg',"]
    assert not re.search(r'src=|href=|@import|url\(|fetch\(', page)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    report = dict(model='m', about='a', layers=[], odd=[math.nan, math.inf, -math.inf, 1e-300, 'NaN'])
    assert embedded_in(page_of(report, tmp_path))['odd'] == [None, None, None, 1e-300, 'NaN']


@pytest.mark.skipif(NODE is None, reason='no node to run the script with')
@pytest.mark.parametrize(
    'low, high, texts',
    [
        (0.1, 0.7, '0.1 0.2 0.3 0.4 0.5 0.6 0.7'),
        (-2, 3, '-2 -1 0 1 2 3'),
        (3.14152, 3.14158, '3.14152 3.14153 3.14154 3.14155 3.14156 3.14157 3.14158'),
        (123456, 123999, '123500 123600 123700 123800 123900'),
        (-3e-7, 3e-7, '-3e-7 -2e-7 -1e-7 0 1e-7 2e-7 3e-7'),
    ],
)
def test_ticks_tell_their_places_apart(tmp_path, low, high, texts):
    page = page_of(dict(model='m', about='', layers=[]), tmp_path)
    script = re.search(r'^function ticksOf.*?^}$', page, re.DOTALL | re.MULTILINE)[0]
    script += f'; console.log(JSON.stringify(ticksOf([{low}, {high}], 7)))'
    done = subprocess.run([NODE, '-e', script], capture_output=True, encoding='utf-8', timeout=60, check=True)
    ticks = json.loads(done.stdout)
    assert ' '.join(text for _, text in ticks) == texts
    assert [value for value, _ in ticks] == pytest.approx([float(text) for _, text in ticks], rel=1e-9, abs=1e-12)


def test_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    old = page_of(dict(model='old', about='', layers=[]), tmp_path)
    with pytest.raises(TypeError):
        write_page(tmp_path / 'page.html', dict(model=object()))
    assert (tmp_path / 'page.html').read_text(encoding='utf-8') == old


@needs_browser
def test_link_shows_its_layer_and_edge(report, tmp_path):
    page_of(report, tmp_path)
    url = (tmp_path / 'page.html').as_uri()
    document, said = dump(f'{url}#layer=h.1.mlp.layers.0&edge=2-5', tmp_path)
    assert said == []
    body = document[: document.index('<script type="application/json"')]
    assert body.count('<tr data-edge=') == 30 and body.count('alert(1)') == body.count('&lt;script&gt;alert(1)') > 0
    assert '<h2 id="edge" aria-live="polite">Feature 2 → neuron 5</h2>' in body
    assert re.findall(r'<tr data-edge="(\S+)" aria-current="true"', body) == ['2-5']
    assert re.search(r'<button aria-label="h.1.mlp.layers.0"[^>]* aria-current="true">1</button>', body)
    plot = body[body.index('<div id="plot">') : body.index('<div id="legend">')]
    for part in ['base', 'spline', 'total', 'fit']:
        (path,) = re.findall(rf'<path class="curve {part}" d="(\S+ [^"]*)"', plot)
        assert len(re.findall(r'[ML][\d.]+ [\d.]+', path)) == 64
    assert [plot.count(f'class="{name}"') for name in ['bar', 'outside']] == [40, 2]
    assert plot.count('class="knot"') == 11  # and one left of all inputs
    assert '93% as trained, – with random initial weights' in body and '</main>' in body


@needs_browser
def test_page_fits_a_phone_and_follows_its_reader(report, tmp_path):
    page_of(report, tmp_path)
    (tmp_path / 'driver.html').write_text(DRIVER, encoding='utf-8')
    document, said = dump((tmp_path / 'driver.html').as_uri(), tmp_path)
    assert said == []
    seen = json.loads(html.unescape(re.search(r'<pre>(.*?)</pre>', document, re.DOTALL)[1]))
    assert max(seen['widths']) <= 360 and max(seen['wide']) <= 1200
    assert (seen['texts'], seen['targets'], seen['drawn'], seen['right']) == ([], [], 1, True)
    assert seen['linked'] == ['Feature 2 → neuron 5', '2 → 5', '2 → 5']  # the row and the tile
    assert [seen[name] for name in ['family', 'activity', 'r2', 'feature', 'edge', 'cleared']] == [8, 2, 11, 10, 1, 30]
    assert seen['curved'] == 30 - 1 - 7
    names = [f'{k % 3} → {k}' for k in range(30)]
    assert seen['best'] == ['descending', names]
    assert seen['worst'] == ['ascending', [*names[28::-1], names[29]]]  # the unknown one is last again
    places = sorted(names, key=lambda name: int(name[0]))
    assert seen['places'] == ['ascending', places]
    assert seen['walked'] == ['Feature 2 → neuron 8', '2 → 8', '2 → 8']
    assert seen['hash'] == '#layer=h.0.mlp.layers.0&edge=2-8'
    assert seen['tile'] == ['Feature 0 → neuron 9', places[3], places[3]]
    assert (seen['tiles'], seen['range']) == (places[24:], '25 to 30 of 30')
    assert seen['spline'] == 0
    assert seen['other'][0] == 'Feature 0 → neuron 0'
    assert seen['followed'][0] == 'Feature 2 → neuron 5' and seen['select'] == 'lm_head'
