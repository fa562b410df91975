"""Half-width punctuation beside a Chinese character, and lines of README that are too long: prose.py [--fix] [FILE...].

Prose is the comments and strings of a Python file (not r'...'; of tests and .ci only comments and docstrings), and
what is not code of Markdown, HTML and ini files. Code in prose stands in backticks; a Markdown link's address does not
count. --fix rewrites the files: look at the diff.
"""
import io
import os
import re
import subprocess
import sys
import tokenize

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
CHINESE = '[\u3400-\u9fff]'
NEAR = '[\u3400-\u9fff\u2026\u3001-\u3011\u201c\u201d\uff08\uff09]'        # Chinese, and its own marks
WRONG = re.compile('(?<={0})[()]|[()](?={0})|(?<={1})[,:;?!]|[,:;?!](?={1})'.format(CHINESE, NEAR))
FULL = dict(zip(',:;?!()', '\uff0c\uff1a\uff1b\uff1f\uff01\uff08\uff09'))
#: What is not prose: code in backticks, Markdown's links and pictures, %(name)s, a URL.
CODE = re.compile(r'(`+).*?\1|\]\([^)\s]*\)|%%\(\w+\)|https?://(?:[^\s;,`\'"%s]|[;,](?=[!-~]))*'
                  % '\uff0c\u3002\uff1b\uff09\u300d', re.S)
WIDE = 160      # columns of README


def python_prose(text, strings):
    """-> (begin, end) of the comments and strings of a program, of the strings only docstrings unless ``strings``."""
    starts = [0]
    for line in text.splitlines(True):
        starts.append(starts[-1] + len(line))
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        docstring = token.type == tokenize.STRING and before in (None, tokenize.INDENT, tokenize.NEWLINE, tokenize.NL)
        if token.type == tokenize.COMMENT or docstring or strings and token.type in STRINGS and token.string[0] != 'r':
            yield begin, end
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type


STRINGS = {tokenize.STRING} | {getattr(tokenize, name) for name in ('FSTRING_MIDDLE',) if hasattr(tokenize, name)}


def markdown_prose(text):
    end = 0
    for fence in re.finditer(r'^ *```.*?^ *```|^    .*?$', text, re.M | re.S):
        yield end, fence.start()
        end = fence.end()
    yield end, len(text)


def html_prose(text):
    """The text between the tags, and of the script its strings and comments are as good as all of it."""
    yield 0, len(text)


def prose_of(path, text):
    if path.endswith('.py'):
        test = os.path.basename(path).startswith('test_') or '.ci' in path.split(os.sep)
        return python_prose(text, not test)
    return markdown_prose(text) if path.endswith('.md') else html_prose(text)


def wrong(path, text):
    """-> the places where the punctuation is wrong, in order."""
    return [begin + place for begin, end in prose_of(path, text) for place in wrong_in(text[begin:end])]


def wrong_in(prose):
    return [m.start() for m in WRONG.finditer(CODE.sub(lambda m: re.sub('[^\n]', 'x', m.group()), prose))]


def fixed(path, text):
    """``text`` with full-width punctuation; both of a pair of parentheses, and no blank beside them."""
    out, done = [], 0
    for begin, end in prose_of(path, text):
        chars = list(re.sub('(?<=%s)::(?=\n)' % CHINESE, '\uff1a', text[begin:end]))
        for _ in range(9):
            for place in wrong_in(''.join(chars)):
                chars[place] = FULL[chars[place]]
            for m in re.finditer('\\(([^()\uff08\uff09\n]*)\uff09|\uff08([^()\uff08\uff09\n]*)\\)', ''.join(chars)):
                chars[m.start()], chars[m.end() - 1] = '\uff08', '\uff09'
        prose = re.sub('(?<=[%s]) (?=\\S)|(?<=\\S) (?=\uff08)' % ''.join(FULL.values()), '', ''.join(chars))
        out += [text[done:begin], prose]
        done = end
    return ''.join(out) + text[done:]


def main():
    fix, names = '--fix' in sys.argv, [name for name in sys.argv[1:] if name != '--fix']
    names = names or [os.path.join(ROOT, name) for name in subprocess.check_output(
        ['git', 'ls-files', '-z'], cwd=ROOT).decode().split('\0') if re.search(r'\.(py|md|html|ini\.example)$', name)]
    bad = 0
    for name in names:
        with open(name, encoding='utf-8', newline='') as f:
            text = f.read()
        if fix:
            text = fixed(name, text)
            with open(name, 'w', encoding='utf-8', newline='') as f:
                f.write(text)
            continue
        for place in wrong(name, text):
            line = text.count('\n', 0, place) + 1
            print('%s:%d: half-width %s beside Chinese: %s' % (os.path.relpath(name, ROOT), line, text[place],
                                                             text[max(0, place - 10):place + 10].replace('\n', ' ')))
            bad += 1
        if name.endswith('.md'):
            for line, content in enumerate(text.splitlines(), 1):
                width = sum(1 + (ord(c) > 0x2e7f) for c in content)
                if width > WIDE:
                    print('%s:%d: %d columns' % (os.path.relpath(name, ROOT), line, width))
                    bad += 1
    print('prose: %d places' % bad)
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
