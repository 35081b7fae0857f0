"""Report phrases that this project does not use, in pages, docstrings, comments and messages; `make lint` runs it.

The text should read as plain, idiomatic technical English. codespell checks the spelling; this script lists phrases
that spread in an earlier version, and what to write instead. Code in Markdown, names in backticks and identifiers are
not prose. A line that has to keep such a phrase, because stock's message has it, ends with ``# prose: stock``.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Regular expression (whole words, any case) -> what to write instead.
PHRASES = {
    r"(?:is|are|was|were|be|being|been) refused": '"raises an error" or "is not supported"',
    r"refuses": '"raises an error"; code has no will',
    r"(?:un)?told|tell|tells|telling": '"report", "print" or "show"',
    r"speaks? of": '"mention" or "describe"',
    r"thinks?|knows": "say what the code does or holds; it does not think or know",
    r"wants": '"needs" or "expects"',
    r"go(?:es)? on|going on|went on": '"continue" or "resume"',
    r"give (?:a|an|one|the|it|them)": '"set", "use" or "pass"',
    r"beside": '"next to", "in addition to" or "besides"',
    r"inside of": '"inside"',
    r"in the place of": '"instead of"',
    r"so many(?:eth)?": "name the number",
    r"a word on": '"a note about"',
    r"the whole story": '"the full log" or "the full traceback"',
    r"(?<!there )is no (?:number|name|word|switch|share|path|folder|file)": '"is not a ..."',
    r"where (?:that|there) (?:is|are|was|were|has|have)": '"if" or "when", for a condition',
    r"where possible": '"if possible"',
    r"micro ?batch(?:es)?": '"micro-batch"',
    r"anew": '"again"',
    r"rooms?|roof": "a term of the field",
}
OWN = (Path(__file__).name, "test_prose.py")
_PATTERN = re.compile(
    "|".join(rf"(?P<p{i}>(?<![\w`.\"'-])(?:{phrase})(?![\w`(=\"'-]))" for i, phrase in enumerate(PHRASES)),
    re.IGNORECASE,
)
_ADVICE = list(PHRASES.values())
_CODE_SPAN = re.compile(r"``[^`]+``|`[^`\n]+`")


def lines_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, prose) of a Markdown page or HTML template, without code."""
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def lines_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, prose) of a Python file: its comments and the contents of its strings."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    kept = {number for number, line in enumerate(text.splitlines(), 1) if line.rstrip().endswith("# prose: stock")}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            # A quotation mark that ends a string would hide its first and last word.
            body = re.sub(r"^[rbufRBUF]*(\"\"\"|'''|\"|')|(\"\"\"|'''|\"|')$", " ", token.string)
            body = re.sub(r"\{[^{}\n]*\}", " ", body)  # what an f-string fills in
            is_name = token.type != tokenize.COMMENT and " " not in body.strip()
            for offset, line in enumerate(body.splitlines()):
                if token.start[0] + offset not in kept and not is_name:
                    yield token.start[0] + offset, line


def problems(path: Path) -> Iterator[str]:
    """Yield one line of text for each phrase in a file that should be another.

    Args:
        path: A Markdown page, a Python file or a template.
    """
    text = path.read_text(encoding="utf-8")
    lines = lines_of_python(text) if path.suffix == ".py" else lines_of_markdown(text)
    for number, line in lines:
        for match in _PATTERN.finditer(_CODE_SPAN.sub(" ", line)):
            advice = _ADVICE[int(str(match.lastgroup)[1:])]
            yield f"{path}:{number}: {match.group()!r}: write {advice}"


def files_below(paths: list[Path]) -> Iterator[Path]:
    """Yield the files to check: those named, and all pages, Python files and templates in folders."""
    for path in paths:
        in_folder = (file for pattern in ("*.md", "*.py", "*.j2") for file in sorted(path.rglob(pattern)))
        # This file and its test quote the phrases.
        yield from (file for file in (path, *in_folder) if file.is_file() and file.name not in OWN)


def main(argv: list[str] | None = None) -> int:
    """Print the problems in the files and folders named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders to check")
    found = [problem for path in files_below(parser.parse_args(argv).paths) for problem in problems(path)]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
