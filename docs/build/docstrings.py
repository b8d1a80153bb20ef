"""Docstrings as this project writes them, in Markdown: an extension of griffe for `mkdocs build`.

    argument  what it is: lines of two aligned columns become a list
        a block that is indented more than its text becomes a code block

The comments behind and above a dataclass's fields become the fields' docstrings.
"""

import re

import griffe

COLUMNS = re.compile(r"([\w`*][\w`*/, ]*?) {2,}(\S.*)")


class ProjectDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
        elif obj.is_attribute and (comment := comment_of(obj)):
            obj.docstring = griffe.Docstring(comment, parent=obj)


def to_markdown(text: str) -> str:
    """A docstring, without its common indentation, as Markdown."""
    lines, listed = [""], False
    for line in text.splitlines():
        match = COLUMNS.fullmatch(line)
        indented = line.startswith("  ")
        if match:
            lines += [] if listed or not lines[-1] else [""]
            lines.append(f"- `{match[1].strip('`')}`: {match[2]}")
        elif listed and indented:
            lines.append(f"  {line.strip()}")
        else:
            new_block = line and (listed or (indented and lines[-1] and not lines[-1].startswith("  ")))
            lines += ["", line] if new_block else [line]
        listed = bool(match) or (listed and indented)
    return "\n".join(lines[1:])


def comment_of(field: griffe.Object) -> str:
    """The comments above a field and behind it on its line."""
    source = field.filepath.read_text(encoding="utf-8").splitlines()
    first, above = field.lineno - 1, []
    while source[first - len(above) - 1].strip().startswith("# "):
        above.insert(0, source[first - len(above) - 1].strip().removeprefix("# "))
    behind = source[field.endlineno - 1].partition("  # ")[2]
    return " ".join([*above, *([behind] if behind and "fmt: skip" not in behind else [])])
