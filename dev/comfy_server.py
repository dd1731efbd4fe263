"""A real ComfyUI server, headless on loopback, with this pack in it, for as long as a `with` block lasts.

    with Server(comfyui, models=folder) as server:
        entry = server.run(prompt, progress=lambda node, value, maximum: ...)
        server.view(entry["outputs"]["8"]["latents"][0])

It runs under the interpreter that runs this, on a free port, with a base directory of its own that is removed
afterwards: the packs are symlinked into its custom_nodes and `models` becomes its models/diffusion_models, so
the checkout is not written to. It is stopped by its pid however the block ends. As a command, see `--help`.
"""
import argparse
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from comfy_boot import PACK, find

NAME = "video-sparse-attention"
PACKS = {NAME: PACK, "demo-pack": PACK / "dev" / "demo_pack"}


def stop_on_signals():
    """SIGTERM and a closed terminal end this process like sys.exit, so that `with Server` stops the server."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))


class ServerError(RuntimeError):
    """Says what failed, then the tail of the server's log and where all of it is."""


class PromptError(ServerError):
    """The server is well, the prompt is not."""


class Server:
    """`packs`: folder name in custom_nodes -> folder. `timeout`: seconds for everything together. `log`: a file
    to keep the server's output in; without one it goes with the base directory."""

    def __init__(self, comfyui=None, packs=PACKS, models=None, timeout=180, log=None, flags=()):
        self.comfyui, self.deadline, self.flags = find(comfyui), time.time() + timeout, list(flags)
        self.packs = {name: Path(folder).resolve() for name, folder in packs.items()}
        self.models = Path(models).resolve() if models else None
        self.timeout, self.log_path, self.process = timeout, log, None

    def left(self):
        left = self.deadline - time.time()
        if left <= 0:
            raise self.error(f"no result within {self.timeout} s")
        return left

    def error(self, what, kind=ServerError):
        kept = f"the whole log: {self.log_path}" if self.log_path else "pass a log file to keep the whole log"
        return kind(f"{what}\n--- end of the server's log ---\n{self.log_text()[-3000:].rstrip()}\n--- {kept} ---")

    def __enter__(self):
        self.tmp = tempfile.TemporaryDirectory(prefix="comfy-server-")
        self.base = base = Path(self.tmp.name)
        (base / "custom_nodes").mkdir()
        (base / "models").mkdir()
        (base / "user" / "default").mkdir(parents=True)   # the page greets a first visit with a dialog
        (base / "user" / "default" / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
        for name, folder in self.packs.items():
            (base / "custom_nodes" / name).symlink_to(folder)
        if self.models:
            (base / "models" / "diffusion_models").symlink_to(self.models)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = open(self.log_path or base / "server.log", "w")
        # A session of its own: Ctrl-C reaches us alone, and we stop the server.
        self.process = subprocess.Popen(
            [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
             "--base-directory", str(base), "--database-url", "sqlite:///:memory:",
             "--disable-auto-launch", "--disable-api-nodes",
             "--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.packs, *self.flags],
            cwd=self.comfyui, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            while True:
                self.check()
                try:
                    self.get("/system_stats")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(min(0.3, self.left()))
            broken = re.findall(r"(?:Cannot import|Error while calling comfy_entrypoint in) .+", self.log_text())
            broken = [line for line in broken if str(self.base / "custom_nodes") in line]
            if broken:
                raise self.error("a pack did not load: " + "; ".join(broken))
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        self.tmp.cleanup()

    def check(self):
        if self.process.poll() is not None:
            raise self.error(f"the server ended with status {self.process.returncode}")

    def log_text(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", Path(self.log.name).read_text(errors="replace"))

    def fetch(self, path, data=None):
        """(status, content type, bytes): a GET, or a POST of `data` as JSON."""
        request = urllib.request.Request(
            self.url + path, None if data is None else json.dumps(data).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=min(60, self.left())) as answer:
                return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("Content-Type", ""), error.read()

    def get(self, path, data=None):
        """(status, body); the body is parsed when it is JSON."""
        status, kind, body = self.fetch(path, data)
        return status, json.loads(body) if "json" in kind else body.decode(errors="replace")

    def view(self, entry):
        """The bytes of a file that a node put in its outputs: {filename, subfolder, type}."""
        status, _, body = self.fetch("/view?" + urllib.parse.urlencode(
            {key: entry[key] for key in ("filename", "subfolder", "type")}))
        if status != 200:
            raise self.error(f"/view answers HTTP {status} for {entry}")
        return body

    def run(self, prompt, progress=None):
        """Queues an API-format prompt, waits for it and returns its /history entry. progress(node, value,
        maximum) is called when a node starts (value and maximum None) and when it reports a step."""
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, progress), self.left()))
        except asyncio.TimeoutError:
            raise self.error(f"the prompt was not done within {self.timeout} s") from None

    async def _run(self, prompt, progress):
        import aiohttp  # ComfyUI's own requirement

        client = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket:
                status, answer = self.get("/prompt", {"prompt": prompt, "client_id": client})
                if status != 200:
                    raise self.error(f"prompt refused ({status}): {json.dumps(answer)[:2000]}", PromptError)
                async for message in socket:
                    if message.type != aiohttp.WSMsgType.TEXT:   # previews are binary
                        continue
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") != answer["prompt_id"]:
                        continue
                    if event["type"] == "executing" and data["node"] is None:
                        break
                    if progress and event["type"] == "executing":
                        progress(data["node"], None, None)
                    if progress and event["type"] == "progress":
                        progress(data["node"], data["value"], data["max"])
                else:
                    self.check()
                    raise self.error("the server closed the connection")
        entry = self.get("/history/" + answer["prompt_id"])[1][answer["prompt_id"]]
        if entry["status"]["status_str"] != "success":
            failed = entry["status"]["messages"][-1][1]
            where = f"node {failed.get('node_id')} ({failed.get('node_type')})"
            why = f"{failed.get('exception_type')}: {failed.get('exception_message', '').strip()}"
            raise self.error(f"prompt failed in {where}: {why}", PromptError)
        return entry


def checks(server, prompt=None, shot=None, workflow=None):
    """Yields (name, passed, what was seen). passed is None where there was nothing to check."""
    status, stats = server.get("/system_stats")
    yield "server", status == 200, f"ComfyUI {stats['system']['comfyui_version']}, pid {server.process.pid}"

    status, info = server.get("/object_info")
    if status != 200:
        raise server.error(f"/object_info answers HTTP {status}: {str(info)[:500]}")
    mine = {name: node for name, node in info.items() if node.get("python_module") == f"custom_nodes.{NAME}"}
    yield "object_info", bool(mine), f"{len(info)} nodes, from the pack: {', '.join(mine) or 'none'}"

    status, templates = server.get("/workflow_templates")
    names = templates.get(NAME, [])
    for name in names:
        status = server.get(f"/api/workflow_templates/{NAME}/{urllib.parse.quote(name)}.json")[0]
        if status != 200:
            break
    yield "workflow_templates", status == 200 if names else None, names or "the pack has none"

    status, i18n = server.get("/i18n")
    found = {lang: [n for n in mine if n in i18n[lang].get("nodeDefs", {})] for lang in i18n}
    yield "i18n", status == 200 if any(found.values()) else None, found or "the pack has none"

    docs = f"/extensions/{NAME}/docs/"
    found = [n for n in mine if 200 in (server.get(f"{docs}{n}.md")[0], server.get(f"{docs}{n}/en.md")[0])]
    yield "help pages", len(found) == len(mine) if found else None, found or "the pack has none"

    status, page = server.get("/")
    yield "page", status == 200 and "<html" in page.lower(), f"HTTP {status}, {len(page)} characters"

    if shot:
        command = ["node", str(PACK / "dev" / "page_shot.mjs"), server.url, shot, *([workflow] if workflow else [])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=server.left())
            yield "screenshot", done.returncode == 0, (done.stdout + done.stderr).strip()[:1500]
        except (OSError, subprocess.TimeoutExpired) as error:
            yield "screenshot", False, str(error)

    if prompt:
        start = time.time()
        try:
            entry = server.run(json.loads(Path(prompt).read_text()))
            outputs = json.dumps(entry["outputs"])[:3000]
            yield "prompt", True, f"done after {time.time() - start:.1f} s, outputs {outputs}"
        except PromptError as error:
            yield "prompt", False, str(error)


def main():
    parser = argparse.ArgumentParser(description="Start a ComfyUI server with this pack, ask it what it knows "
                                     "about the pack, run a prompt, stop it. Exits with 1 if a check failed.")
    parser.add_argument("--prompt", metavar="API.json", help="API-format prompt to run")
    parser.add_argument("--models", metavar="FOLDER", help="becomes models/diffusion_models")
    parser.add_argument("--comfyui", help="checkout (default: as comfy_boot.locate finds it)")
    parser.add_argument("--shot", metavar="PAGE.png", help="screenshot of the page (see page_shot.mjs for its needs)")
    parser.add_argument("--workflow", metavar="UI.json", help="workflow to open on the page first")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for everything (default %(default)s)")
    parser.add_argument("--log", metavar="FILE", help="keep the server's output here")
    args = parser.parse_args()
    for path in (args.prompt, args.models, args.workflow):
        if path and not Path(path).exists():
            parser.error(f"{path} does not exist")
    stop_on_signals()
    start, good = time.time(), True
    try:
        with Server(args.comfyui, models=args.models, timeout=args.timeout, log=args.log) as server:
            print(f"up after {time.time() - start:.1f} s")
            for name, passed, seen in checks(server, args.prompt, args.shot, args.workflow):
                print(f"{ {True: 'ok  ', False: 'FAIL', None: 'none'}[passed]} {name}: {seen}", flush=True)
                good &= passed is not False
    except ServerError as error:
        print(f"FAIL {error}")
        good = False
    print(f"server stopped, {time.time() - start:.1f} s in all")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
