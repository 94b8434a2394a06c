"""The proxy that decides, in front of any server with OpenAI's interface."""

import threading
from contextlib import contextmanager

import httpx

from mola.checkpoints.skills_folder import read_skills
from mola.models.tokenizer import load_tokenizer
from mola.serving.model_names import name_behind, skill_model_names
from mola.serving.serve import ServeOptions
from mola.serving.server import Server, bind, url_of
from mola.serving.skill_loading import SkillLoader
from mola.serving.skills_proxy import SkillsProxy
from mola.serving.vllm_skills import load_lower_layers

from ..waiting import wait_until
from .skills_folders import FOLDER


class Nothing:
    """Generates no answers of its own."""

    def stop(self):
        pass

    abort = close = stop


@contextmanager
def running_proxy(url, folder, base, root=None, token=None):
    """The URL of a proxy in front of a server.

    Args:
        url: of the server behind.
        folder: the skills folder.
        base: folder of the base model, whose name is the folder's.
        root: folder below which clients may load skills.
        token: of both servers.
    """
    skills = read_skills(folder)
    options = ServeOptions(adapter=[str(folder)], dtype="float32", device="cpu")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    client = httpx.AsyncClient(base_url=url, headers=headers, timeout=None)
    names = skill_model_names(FOLDER, skills, base.name)
    names_behind = {None: base.name, **{name: name_behind(name, skills.adapter(name)) for name in skills.names}}
    proxy = SkillsProxy(client, names, names_behind, load_lower_layers(options, str(folder)), load_tokenizer(base))
    loader = SkillLoader(root, skills, proxy.names, proxy.add_skill, proxy.remove_skill)
    with bind("127.0.0.1", 0) as bound:
        server = Server(proxy.app(loader, token, 20_000), Nothing(), 64, 1.0, "Serving")
        thread = threading.Thread(target=server.run_on, args=[bound])
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join()
