"""measure/demo.py: the story that plain `python longred.py` tells."""

from measure import evaluate


def test_pictures_of_the_demo_need_losses_only(tmp_path):
    curves = {"original": [3.0, 9.0], "LongReD": [3.1, 2.9]}
    results = [
        (name, tmp_path, {"kept": {"loss": 2.0}, "position": {"whole": {"nll": curve}}})
        for name, curve in curves.items()
    ]
    assert evaluate.draw(results, tmp_path, 256, 1024) == [tmp_path / "overview.png"]
