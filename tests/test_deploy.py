"""The image and the examples of deployment, as far as they can be checked without Docker: what they name exists."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from service_cases import app_of, asynchronous
from test_packaging import SOURCES

from engine.serve import _check, _parser

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, with their continued lines joined and without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def arguments(of: str) -> list[list[str]]:
    return [json.loads(rest) for name, rest in instructions() if name == of]


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def kubernetes() -> dict[str, dict]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def commands() -> dict[str, list[str]]:
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    return {
        "Dockerfile": arguments("CMD")[0],
        "compose": compose()["services"]["psunet"]["command"],
        "kubernetes": pod["containers"][0]["args"],
    }


@pytest.mark.parametrize("place", ["Dockerfile", "compose", "kubernetes"])
def test_the_commands_are_options_of_the_service(place):
    options = _parser().parse_args(commands()[place])
    _check(options)
    assert options.host == "0.0.0.0" and options.port == 8000
    assert place == "Dockerfile" or options.token_file, "a service that other machines reach needs a token"


def test_the_image_is_built_from_all_that_the_package_needs():
    assert [rest for name, rest in instructions() if name == "FROM"][0].count(":") == 1, "no base without a tag"
    copied = {source for name, rest in instructions() if name == "COPY" for source in shlex.split(rest)[:-1]}
    assert copied == set(SOURCES)
    assert all((ROOT / source).exists() for source in copied)
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    declared = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    assert compose()["services"]["psunet"]["build"]["args"].keys() == declared
    assert {line[1:] for line in lines if line.startswith("!")} == copied


def test_the_image_runs_the_service_without_root_and_stops_it_with_sigterm():
    names = dict(instructions())
    assert arguments("ENTRYPOINT") == [["python", "-m", "engine.serve"]]
    assert names["STOPSIGNAL"] == "SIGTERM" and names["USER"] not in ("root", "0")
    assert (
        f"--uid {kubernetes()['Deployment']['spec']['template']['spec']['securityContext']['runAsUser']} "
        in " ".join(rest for name, rest in instructions() if name == "RUN")
    )
    extra = re.search(r"pip install .*'\.\[(\w+)\]'", (ROOT / "Dockerfile").read_text(encoding="utf-8"))[1]
    assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_an_image_that_was_loaded_into_the_node_is_not_pulled():
    container = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert container["imagePullPolicy"] == "IfNotPresent", "the default for the tag latest is Always"


@asynchronous
async def test_probes_ask_routes_of_the_application(engine):
    routes = {route.path for route in app_of(engine)[0].routes}
    container = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/health", "liveness": "/health", "readiness": "/ready",
    }  # fmt: skip
    assert all(probe["path"] in routes and ports[probe["port"]] == 8000 for probe in probes.values())
    asked = re.search(r"HEALTHCHECK.*?127\.0\.0\.1:8000(/\w+)", (ROOT / "Dockerfile").read_text(), re.DOTALL)[1]
    assert asked in routes


def test_grace_periods_are_longer_than_the_drain():
    drains = {place: _parser().parse_args(command).drain for place, command in commands().items()}
    assert int(compose()["services"]["psunet"]["stop_grace_period"].removesuffix("s")) > drains["compose"]
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    program, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep" and pod["terminationGracePeriodSeconds"] > float(seconds) + drains["kubernetes"]


def test_tokens_are_secrets_and_services_find_their_pods():
    service, found = compose(), kubernetes()
    given = {place: _parser().parse_args(command).token_file for place, command in commands().items()}
    assert given["compose"] == Path("/run/secrets") / service["services"]["psunet"]["secrets"][0]
    assert set(service["services"]["psunet"]["secrets"]) == set(service["secrets"])
    template = found["Deployment"]["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert "secret" in volumes[mounts[str(given["kubernetes"].parent)]]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == pod["containers"][0]["ports"][0]["name"]
    assert {"requests", "limits"} == set(pod["containers"][0]["resources"])
