"""Skills that are added and removed while a server runs. Running answers keep the skill they began with.

A client names a skill in a skills folder: its statistics come with it, so no data is needed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.skills_folder import SkillsFolder, check_layer, check_skill_name, read_skills
from mola.models.prompts import Chat, own_chat
from mola.serving.adapter_root import AdapterRoot, wrong_folder, wrong_name
from mola.serving.responses import unknown_model
from mola.tuner.skills.decision import SkillStatistics


class SkillLoader:
    """Adds and removes the skills of a server.

    Args:
        root: folder below which skills may be loaded; None if clients may load none.
        served: the skills folder that the server was started with.
        names: name in requests -> name of the skill; skills are added to it and removed from it.
        add: coroutine function that adds a skill to the model: its name, folder and statistics.
        remove: coroutine function that removes a skill from the model, when no answer uses it.
        chats: name of a skill -> its own chat format; None if chats are not written here.
    """

    def __init__(
        self,
        root: str | None,
        served: SkillsFolder,
        names: dict[str, str | None],
        add: Callable[[str, str, SkillStatistics], Awaitable[None]],
        remove: Callable[[str], Awaitable[None]],
        chats: dict[str, Chat] | None = None,
    ) -> None:
        self._root, self._served, self._names = AdapterRoot(root), served, names
        self._add, self._remove = add, remove
        self._chats = {} if chats is None else chats
        self._loading = asyncio.Lock()  # two loads at once could choose the same name

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Add the skill in a folder below the root under a name.

        Raises:
            RequestError: loading is not allowed, the name is taken, or the folder is no skill of a skills folder.
            MolaError: the skill does not fit the served ones.
        """
        folder = self._root.folder(path)
        async with self._loading:
            self._check_new(name, in_place)
            await self._add(name, folder, await run_in_threadpool(_read_skill, folder, self._served))
            if (chat := own_chat(folder)) is not None:
                self._chats[name] = chat
            self._names[name] = name

    async def unload(self, name: str) -> None:
        """Remove a name at once, and its skill from memory when the last answer that uses the skill has ended.

        Raises:
            RequestError: unloading is not allowed, or there is no such skill.
        """
        self._root.check_allowed()
        if name not in self._names:
            raise unknown_model(name, self._names)
        if self._names[name] != name:
            raise wrong_name(f"`lora_name` {name!r} is no skill, so it cannot be unloaded.")
        del self._names[name]
        self._chats.pop(name, None)
        await self._remove(name)

    def _check_new(self, name: str, in_place: bool) -> None:
        if in_place:
            raise wrong_name("`load_inplace` cannot replace a skill. Unload the skill, and load the new one.")
        if name in self._names:
            raise wrong_name(f"`lora_name` {name!r} is taken. Pass a different name, or unload the skill first.")
        check_skill_name(name)


def _read_skill(path: str, served: SkillsFolder) -> SkillStatistics:
    """Statistics of the skill in a folder; checks that it is a skill of the served base model and layer."""
    folder = Path(path)
    others = read_skills(folder.parent) if is_skills_folder(folder.parent) else None
    if others is None or folder.name not in others.skills:
        raise wrong_folder(
            "`lora_path` must be one skill of a skills folder, such as more/NAME: without statistics nobody knows "
            "which prompts ask the LoRA. `mola skills add` makes a skill of a LoRA."
        )
    served.check_base(others.base_model, others.base_digest)
    check_layer(served, others.layer, str(others.path))
    return SkillStatistics.from_tensors(others.statistics[folder.name])
