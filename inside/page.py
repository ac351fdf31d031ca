"""The page where people read the learned functions of KAN layers: one file of HTML that needs no network."""

import json
from pathlib import Path

from run.files import write_file
from run.records import without_nan

TEMPLATE = Path(__file__).with_name('page.html')


def write_page(path, report):
    """Write the page of `report`, a dict that JSON can hold, to the file `path`. Layers, inputs and edges:

    {model, about, layers: [{name, features, outputs, edges_total, grid_size, spline_order, activation,
        summary: {straight, outside, random_straight},
        inputs: {feature: {low, high, knots, grid: [low, high], counts}},
        edges: [{i, o, activity, share, affine_r2, r2, family, formula, others: [[family, r2], ...], roughness,
            total, base, fit}, ...]}, ...]}

    total, base and fit are a function's values at even points of low..high of feature i; fit may be None, as may any
    number. The page has all digits of all numbers: rounded ones make a smaller file.
    """
    write_file(path, TEMPLATE.read_text(encoding='utf-8').replace('{{report}}', embedded(report)))


def embedded(report):
    """The JSON of `report` as the text of a script element: no `<` that could end it, null for NaN and infinities."""
    return json.dumps(without_nan(report), allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
