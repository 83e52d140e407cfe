"""What every screen must pass: nothing wider than the window, and text that stands out from its background.

Contrast is WCAG 2.1's (1.4.3): 4.5 for text, 3 for large text (24 px, or 18.7 px and bold). Text of disabled controls
is exempt, as there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SHOTS = Path(os.environ.get("SHOTS") or Path(__file__).parent / "shots")

WIDER = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll('body *')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
    .map((one) => `${one.tagName} #${one.id} .${one.className} ends at ${one.getBoundingClientRect().right}`)
    .slice(-5)"""

FAINT = """() => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d', {willReadFrequently: true}), known = new Map();
  const rgba = (color) => {
    if (!known.has(color)) {
      context.clearRect(0, 0, 1, 1); context.fillStyle = color; context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      known.set(color, [r, g, b, a / 255]);
    }
    return known.get(color);
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const background = (one) => {
    const layers = [];
    for (let at = one; at; at = at.parentElement) {
      const style = getComputedStyle(at), color = rgba(style.backgroundColor);
      if (style.backgroundImage !== 'none') return null;
      if (color[3] > 0) layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((part) => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Map();
  const look = (one, text) => {
    const box = one.getBoundingClientRect();
    if (box.width < 3 || box.height < 3 || one.closest('svg, :disabled, [aria-disabled=true]')) return;
    if (!one.checkVisibility({opacityProperty: true, visibilityProperty: true})) return;
    const behind = background(one), style = getComputedStyle(one);
    if (!behind) return;
    let [r, g, b, alpha] = rgba(style.color);
    for (let at = one; at; at = at.parentElement) alpha *= Number(getComputedStyle(at).opacity);
    const lights = [luminance(over([r, g, b, alpha], behind)), luminance(behind)];
    const contrast = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    if (contrast < (size >= 24 || (bold && size >= 18.66) ? 3 : 4.5) - 0.005)
      found.set(`${text.slice(0, 40)}`, `"${text.slice(0, 40)}" ${contrast.toFixed(2)}: ${style.color} on ` +
        `rgb(${behind.map(Math.round)}) in ${one.tagName}.${one.className}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), one = walker.currentNode.parentElement;
    if (text && one && !['SCRIPT', 'STYLE', 'OPTION', 'NOSCRIPT'].includes(one.tagName)) look(one, text);
  }
  const boxes = 'input:not([type=radio], [type=checkbox], [type=range], [type=file]), textarea, select';
  document.querySelectorAll(boxes).forEach((one) => one.value && look(one, String(one.value)));
  return [...found.values()];
}"""


def shoot(page: Any, name: str) -> None:
    """Keeps a picture of the whole page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def faults(page: Any, name: str) -> list[str]:
    """Keeps a picture of the page, and says what is wider than the window or too faint."""
    shoot(page, name)
    return [f"{name}: {one}" for one in [*page.evaluate(WIDER), *page.evaluate(FAINT)]]
