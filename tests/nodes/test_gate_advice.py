"""What a user is told when a VSA-trained model leaves its training."""
GRID = (5, 10, 12)


def test_settings_that_make_a_trained_model_partly_dense_are_named_at_once(gated, vsa, caplog):
    vsa(gated, 0.5, start_percent=0.2, end_percent=0.9, dense_blocks="0")
    assert "start_percent 0.2 (wanted 0), end_percent 0.9 (wanted 1), dense_blocks (wanted none)" in caplog.text


def test_fitting_settings_and_models_without_gates_give_no_warning(gated, wan, vsa, caplog):
    vsa(gated, 0.5)
    vsa(wan, 0.5, start_percent=0.5)
    assert "[VSA]" not in caplog.text


def test_a_sparsity_other_than_the_trained_one_is_named(wan, gate_file, with_gates, vsa, run_of, draw, tmp_path,
                                                  caplog):
    named = tmp_path / "FastWan2.1-T2V-1.3B.safetensors"
    named.symlink_to(gate_file)
    model = with_gates(wan, named)
    patched = vsa(model, 0.9)
    sentence = "sparsity 0.9 differs from the 0.8 that FastWan2.1-T2V-1.3B was trained with"
    assert sentence in caplog.text
    draw(patched, GRID)
    assert sentence in run_of(patched).said
    caplog.clear()
    draw(fits := vsa(model, 0.8), GRID)
    assert not any("differs" in note for note in run_of(fits).said) and "differs" not in caplog.text


def test_every_dense_call_of_a_trained_model_is_named_after_sampling(gated, vsa, run_of, draw):
    draw(small := vsa(gated, 0.5, min_tokens=10000), GRID)
    said = "WARNING: 4 attention calls of this VSA-trained model ran dense"
    assert any(note.startswith(said) and "Lower min_tokens" in note for note in run_of(small).said)
    draw(late := vsa(gated, 0.5, start_percent=0.9), GRID)
    assert any("Set start_percent to 0" in note for note in run_of(late).said)


def test_sampling_a_trained_model_without_the_vsa_node_warns(gated, vsa, draw, caplog):
    draw(gated, GRID)
    assert "is about to run dense and without its gates" in caplog.text
    caplog.clear()
    draw(vsa(gated, 0.5), GRID)
    assert "about to run dense" not in caplog.text
