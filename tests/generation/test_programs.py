"""Compiled programs are kept between processes, unless the user has chosen otherwise."""

import json

SOURCE = """
    import json, os, pathlib, sys
    import jax
    {before}
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
    import trustcore as tc
    from tests.generation.characters import byte_model
    model = byte_model()
    hits.clear()
    text = tc.generate(model, "hello", max_tokens=6)
    folder = pathlib.Path(os.environ["TRUSTCORE_CACHE"]) / "programs"
    kept = sorted(p.name for p in folder.glob("*-cache")) if folder.exists() else []
    print(json.dumps([text, kept, hits.count("/jax/compilation_cache/cache_hits")]))
"""


def run(fresh_python, folder, before=""):
    printed = fresh_python(SOURCE.format(before=before), environment={"TRUSTCORE_CACHE": str(folder)})
    return json.loads(printed.splitlines()[-1])


def test_a_second_process_starts_warm(fresh_python, tmp_path):
    text, kept, _ = run(fresh_python, tmp_path)
    assert any(name.startswith("jit__prefill") for name in kept) and any("jit__decode" in name for name in kept)
    again, kept_again, hits = run(fresh_python, tmp_path)
    assert again == text and set(kept) <= set(kept_again) and hits >= 2


def test_a_users_own_choice_stands(fresh_python, tmp_path):
    off = 'jax.config.update("jax_enable_compilation_cache", False)'
    assert run(fresh_python, tmp_path, off)[1:] == [[], 0]
    elsewhere = f'jax.config.update("jax_compilation_cache_dir", {str(tmp_path / "mine")!r})'
    assert run(fresh_python, tmp_path, elsewhere)[1] == []
