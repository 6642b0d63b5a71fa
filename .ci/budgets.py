"""Check the sizes of the files against their budgets. Exit with 1 if one is over."""

import io
import pathlib
import re
import sys
import tokenize

HERE = pathlib.Path(__file__).resolve().parent.parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def code_lines(source: str) -> int:
    """Return the number of lines that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    starts_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and starts_statement:
            continue  # a docstring
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
            starts_statement = False
        elif token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            starts_statement = True
    return len(lines)


def main() -> int:
    """Print each size with its budget. Return 1 if any is over, else 0."""
    chat, page = read("chat.py"), read("index.html")
    visible = re.sub("<details>.*?</details>\n", "", read("README.md"), flags=re.DOTALL)
    sizes = [
        ("chat.py, lines", len(chat.splitlines()), 400),
        ("chat.py, lines of code", code_lines(chat), 290),
        ("index.html, lines", len(page.splitlines()), 780),
        ("index.html, bytes", len(page.encode()), 38_000),
        ("index.html, columns", max(map(len, page.splitlines())), 110),
        ("test_chat.py, lines", len(read("test_chat.py").splitlines()), 1_900),
        ("README.md, lines outside <details>", len(visible.splitlines()), 175),
    ]
    for name, size, budget in sizes:
        print(f"{name}: {size:,} of {budget:,}{' IS TOO MUCH' if size > budget else ''}")
    return int(any(size > budget for _, size, budget in sizes))


if __name__ == "__main__":
    sys.exit(main())
