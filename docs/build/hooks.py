"""What `mkdocs build` takes from the program itself: `--help` of the commands, and the service's OpenAPI document.

<!-- help: engine.sample -->    in a page becomes what `python -m engine.sample --help` prints
<!-- endpoints -->              becomes a table of endpoints and one for each body
"""

import json
import os
import re
import subprocess
import sys

HELP = re.compile(r"<!-- help: ([\w. ]+) -->")


def on_page_markdown(markdown: str, **_) -> str:
    markdown = HELP.sub(lambda match: help_of(match[1].split()), markdown)
    return markdown.replace("<!-- endpoints -->", endpoints()) if "<!-- endpoints -->" in markdown else markdown


def help_of(command: list[str]) -> str:
    environment = os.environ | {"COLUMNS": "100"}
    text = subprocess.run([sys.executable, "-m", *command, "--help"], env=environment, capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    return f"```text\n{text}```"


def endpoints() -> str:
    """From the document that the service itself answers with."""
    from engine import AsyncEngine, Engine
    from engine.serving.app import create_app

    with Engine.from_pretrained(device="cpu", dtype="float32") as engine:
        document = create_app(AsyncEngine(engine)).openapi()
    rows, bodies = ["| endpoint | | body |", "|---|---|---|"], {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                bodies[body["title"]] = body
            title = f"[{body['title']}](#{body['title'].lower()})" if body else ""
            rows.append(f"| `{method.upper()} {path}` | {operation['summary']} | {title} |")
    tables = ["\n".join(rows)]
    for title, body in bodies.items():
        fields = [
            f"### {title}",
            "",
            body.get("description", ""),
            "",
            "| field | type | default | |",
            "|---|---|---|---|",
        ]
        for name, schema in body["properties"].items():
            default = "required" if name in body.get("required", ()) else f"`{json.dumps(schema.get('default'))}`"
            fields.append(f"| `{name}` | {kind(schema)} | {default} | {schema.get('description', '')} |")
        tables.append("\n".join(fields))
    return "\n\n".join(tables)


def kind(schema: dict) -> str:
    """A JSON schema's type in a word or two."""
    if "anyOf" in schema:
        return ", ".join(dict.fromkeys(kind(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "minimum" in schema and "maximum" in schema:
        return f"{schema['type']} {schema['minimum']:g} to {schema['maximum']:g}"
    return schema.get("type", "any")
