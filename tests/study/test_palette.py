"""Colours of reports: they can be read, and told apart by everyone, on both grounds."""

import itertools
import re

import numpy as np
import pytest

from jaxpo.study import palette


def test_beyond_ten_methods_dashes_and_markers_tell_colours_apart():
    styles = palette.styles_of([str(place) for place in range(40)], '0', most=40)
    assert len({(style.colour, style.dash) for style in styles.values()}) == 40
    ten = [styles[str(place)] for place in range(10)]
    assert len({style.colour for style in ten}) == 10 and not any(style.dash for style in ten)


def luminance(colour):
    return np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)


def linear(colour):
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


GROUNDS = {'light': palette.LIGHT, 'dark': palette.DARK}
SERIES = [f'c{place}' for place in range(palette.COLOURS)]


@pytest.mark.parametrize('colours', GROUNDS.values(), ids=GROUNDS)
def test_text_and_marks_stand_out_from_their_ground(colours):
    for text, ground in itertools.product(('ink', 'soft', 'accent'), ('paper', 'panel')):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for level in range(palette.LEVELS):
        assert contrast(colours['ink'], colours[f'h{level}']) >= 4.5
    for mark in SERIES:
        assert contrast(colours[mark], colours['paper']) >= 3, mark


# Machado, Oliveira and Fernandes 2009, IEEE Transactions on Visualization and Computer Graphics 15: severity 1.
SIGHT = {
    'full': np.eye(3),
    'protanopia': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    'deuteranopia': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    'tritanopia': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


@pytest.mark.parametrize('sight', SIGHT)
@pytest.mark.parametrize('colours', GROUNDS.values(), ids=GROUNDS)
def test_ten_methods_can_be_told_apart_by_everyone(colours, sight):
    """By distance in OKLab (Ottosson 2020), where 0.02 is about the least that is noticed."""
    seen = np.clip([np.array(SIGHT[sight]) @ linear(colours[name]) for name in (*SERIES, 'muted')], 0, 1)
    lab = np.cbrt(seen @ np.array(TO_CONES).T) @ np.array(TO_LAB).T
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(len(lab))
    assert distances.min() > 0.06


def test_both_grounds_and_paper_define_every_colour():
    sheet = palette.style_sheet()
    assert {*palette.LIGHT} == {*palette.DARK}
    used = {*re.findall(r'var\(--(\w+)\)', sheet)}
    defined = [{*re.findall(r'--(\w+):#', block)} for block in re.findall(r':root\{([^}]*)\}', sheet)]
    assert len(defined) == 3 and all(used <= names for names in defined)
    assert 'prefers-color-scheme:dark' in sheet
