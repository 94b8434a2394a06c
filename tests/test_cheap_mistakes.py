"""What needs no model is answered, and what can be found wrong without a model is found, before torch is imported."""

import json
from pathlib import Path

from tests.reporting.test_without_torch import answers

FOLDERS = Path(__file__).parent / "golden" / "version_1_0_0"


def test_skills_list_needs_no_torch(tmp_path):
    skills = str(FOLDERS / "skills")
    calls = [["skills", "list", skills], ["skills", "list", skills, "--json"], ["skills", "list", str(tmp_path)]]
    table, as_json, refused = answers(*calls)
    assert "birds" in table[1]
    assert json.loads(as_json[1])["skills"]["rivers"]["rank"] == 2
    assert "must be a skills folder" in refused[1]
    assert [code for code, *_ in (table, as_json, refused)] == [0, 0, 2]
    assert not any(imported for *_, imported in (table, as_json, refused))
