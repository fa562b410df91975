"""The chart of README, examples/speed.svg, from figures.json: bench.py and aibot.py write what they measured there."""
import html
import json
import os

HERE = os.path.dirname(os.path.abspath(__file__))
FIGURES, CHART = os.path.join(HERE, 'figures.json'), os.path.join(HERE, os.pardir, os.pardir, 'examples', 'speed.svg')
STYLE = ('text{fill:#333}.ours{fill:#0a66d0}.peer{fill:#b8bec8}'
         '@media(prefers-color-scheme:dark){text{fill:#ddd}.peer{fill:#667}}')


def keep(title, rows):
    """Keep ``rows``, [[name, value, is it ours]], under ``title`` and draw the chart again."""
    with open(FIGURES, encoding='utf-8') as f:
        figures = json.load(f)
    figures[title] = sorted(rows, key=lambda row: row[1])
    with open(FIGURES, 'w', encoding='utf-8') as f:
        json.dump(figures, f, ensure_ascii=False, indent=1)
        f.write('\n')
    draw(figures)


def draw(figures):
    parts, y = [], 20
    for title, rows in figures.items():
        parts.append('<text x="20" y="%d">%s</text>' % (y, html.escape(title)))
        top = max(value for _, value, _ in rows)
        for name, value, ours in rows:
            y, width, bold = y + 26, 330 * value / top, ' font-weight="bold"' * ours
            parts.append('<text x="282" y="%d" text-anchor="end"%s>%s</text>' % (y, bold, html.escape(name)))
            parts.append('<rect x="290" y="%d" width="%.0f" height="16" rx="3" class="%s"/><text x="%.0f" y="%d"%s>%.1f'
                         '</text>' % (y - 13, width, 'ours' if ours else 'peer', 296 + width, y, bold, value))
        y += 44
    with open(CHART, 'w', encoding='utf-8') as f:
        f.write('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 %d" font-family="sans-serif" font-size="13">'
                '<style>%s</style>%s</svg>\n' % (y - 28, STYLE, ''.join(parts)))


if __name__ == '__main__':
    with open(FIGURES, encoding='utf-8') as figures:
        draw(json.load(figures))
