import json
from dataclasses import replace

import pytest

from bae_lens import ComSemReport
from bae_lens.comsem.exports import save


def test_files_have_the_shapes_that_other_tools_read(report, tmp_path):
    save(report, tmp_path)
    assert ComSemReport.from_dict(json.loads((tmp_path / "comsem.json").read_text())) == report
    result = json.loads((tmp_path / "saebench" / "known.json").read_text())
    assert result["eval_type_id"] == "comsem"
    assert result["eval_result_metrics"]["comsem"]["score"] == 0.75
    assert result["eval_result_metrics"]["comsem"]["judge_passed_self_test"] is False
    assert len(result["eval_result_details"]) == 4
    lines = [json.loads(line) for line in (tmp_path / "neuronpedia" / "known.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"modelId", "source", "index", "explanation", "typeName", "explanationModelName"}
    assert (lines[1]["index"], lines[1]["explanation"], lines[1]["explanationModelName"]) == ("1", "the", "rules†")


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "", "a\\b", "/tmp/x"])
def test_a_name_that_is_none_of_a_file_is_refused_before_anything_is_written(report, tmp_path, name):
    changed = replace(report, dictionaries=[replace(report.dictionaries[0], name=name)])
    with pytest.raises(ValueError, match="is no name of one"):
        save(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
