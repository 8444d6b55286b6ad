"""Steps of the site's build: notebooks become pages, formulas MathML, doctests blocks of code, and
pages get the tables and figures of measured results.

Browsers draw MathML by themselves, so the site needs no script for it and no network.
Notebooks are shown as they were stored; nothing is run.
"""

import html
import json
import pathlib
import re
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'experiments' / 'notebooks'
RESULTS = pathlib.Path(__file__).parents[1] / 'experiments' / 'results'
RESULT = re.compile(
  r'<!-- results: (\S+) -->'
)  # a Markdown file in RESULTS, whose text stands here
# As pymdownx.arithmatex leaves formulas, in lines and as blocks.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# Bars and slashes, which would grow and stand apart like operators.
BAR = re.compile('<mo(?: stretchy="false")?>(&#x0007C;|&#x02016;|&#x0002F;)</mo>')

# Lines from a prompt to the next empty line.
DOCTEST = re.compile(r'^>>> .*(?:\n.+)*', re.MULTILINE)

# Code in a table may be broken between the parts of a path or name.
CELL = re.compile(r'<td.*?</td>', re.DOTALL)
CODE = re.compile(r'(?<=<code>)[^<]*(?=</code>)')
BREAK = re.compile(r'(?=::)|(?<=/)|(?<=\w_)')


class Doctests(griffe.Extension):
  """Fences the examples of docstrings; Markdown would take their prompts for quotations."""

  def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
    if obj.docstring:
      obj.docstring.value = DOCTEST.sub(
        lambda lines: fenced('pycon', lines[0]), obj.docstring.value
      )


def on_config(config: Any) -> None:
  """Adds to the section "Notebooks" those that it does not name."""
  (section,) = (entry['Notebooks'] for entry in config.nav if 'Notebooks' in entry)
  named = {path for entry in section for path in entry.values()}
  for path in sorted(NOTEBOOKS.glob('*.ipynb')):
    if page_of(path) not in named:
      section.append({title(path): page_of(path)})


def on_files(files: Files, config: Any) -> None:
  for path in NOTEBOOKS.glob('*.ipynb'):
    files.append(File.generated(config, page_of(path), content=notebook_as_markdown(path)))
  for path in RESULTS.glob('estimators/*.png'):
    name = f'results/{path.relative_to(RESULTS)}'
    files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
  return RESULT.sub(lambda path: (RESULTS / path[1]).read_text(), markdown)


def on_page_content(content: str, **_: Any) -> str:
  content = CELL.sub(lambda cell: CODE.sub(breakable, cell[0]), content)
  return FORMULA.sub(as_mathml, content)


def page_of(notebook: pathlib.Path) -> str:
  return f'notebooks/{notebook.stem}.md'


def cells(notebook: pathlib.Path) -> list[dict]:
  return json.loads(notebook.read_text())['cells']


def title(notebook: pathlib.Path) -> str:
  """The first heading."""
  return ''.join(cells(notebook)[0]['source']).splitlines()[0].removeprefix('# ')


def notebook_as_markdown(notebook: pathlib.Path) -> str:
  parts = ['---\nhide: [toc]\n---']
  for cell in cells(notebook):
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
      parts.append(source)
    else:
      parts += [fenced('python', source), *(shown(output) for output in cell['outputs'])]
  parts.append(f'*The notebook: `experiments/notebooks/{notebook.name}`.*')
  return '\n\n'.join(parts)


def shown(output: dict) -> str:
  """A picture where there is one, a table as it was written, or else plain text."""
  data = output.get('data', {})
  if 'image/png' in data:
    return f'![output](data:image/png;base64,{"".join(data["image/png"].split())})'
  if 'text/html' in data:
    return f'<div>{"".join(data["text/html"])}</div>'
  text = output.get('text') or data.get('text/plain') or output.get('traceback', [])
  return fenced('text', ''.join(text).rstrip())


def breakable(code: re.Match) -> str:
  return BREAK.sub('<wbr>', code[0])


def fenced(language: str, text: str) -> str:
  return f'```{language}\n{text}\n```'


def as_mathml(formula: re.Match) -> str:
  kind, latex = formula.groups()
  display = 'inline' if kind == 'span' else 'block'
  mathml = convert(html.unescape(latex).strip(), display=display)
  mathml = BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', mathml)
  return mathml if kind == 'span' else f'<div class="formula">{mathml}</div>'
