"""`mola skills list`: what a skills folder holds. Needs no torch, so the command answers at once.

mola skills list my-skills
"""

import json

from mola.checkpoints.skills_folder import read_skills
from mola.files.atomic import atomic_write_json
from mola.files.terminal import make_table_console
from mola.options.fields import check_results
from mola.skills.options import ListOptions
from mola.skills.summary import describe, summarize, summary_dict, summary_table


def main(options: ListOptions) -> int:
    """Print the skills as a table or as JSON; returns 0, the exit code."""
    check_results(options)
    folder = read_skills(options.folder)
    skills = summarize(folder)
    if options.json == "-":
        print(json.dumps(summary_dict(folder, skills), indent=2))
        return 0
    make_table_console().print(summary_table(skills))
    print(describe(folder))
    if options.json is not None:
        print(f"Written to {atomic_write_json(options.json, summary_dict(folder, skills))}.")
    return 0
