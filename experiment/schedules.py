"""Schedules of our own, in place of the paper's: a GPU's work cut to a CPU's, and the synthetic videos'. Each
says what differs from the defaults in train.py, which are the paper's for CamVid."""

# short: the controller's rate is higher here, as the paper's needs its 1000 samples (docs/ppo.md).
SHORT = dict(
    auxiliary_cell=False,
    static_epochs=60, static_batch=8, static_crop=(360, 480), static_scale=(0.7, 1.4),
    static_lr_encoder=2e-2, static_lr_decoder=2e-2, validate_every=5,
    input_pad=0, search_strategy="both", search_candidates=24, search_epochs=2, search_batch=16,
    early_stop_rule="average", controller_lr=3e-3, controller_rollout=4, controller_replay=0,
    controller_epochs=4, controller_entropy=1e-3,
    cells=1, cell=("attention", "decoder"),
    cell_epochs=24, cell_mirrored=True, cell_dropout=0.4, cell_batch=8,
    end_epochs=3, end_lr_cell=1e-3, end_crop=(360, 480))

# smoke: only to see that everything runs.
SMOKE = dict(
    auxiliary_cell=False, gradient_norm=0,
    static_epochs=1, static_batch=16, static_crop=(32, 32), validate_every=0,
    input_pad=0, cell_layers=2, search_candidates=4, search_epochs=1, search_batch=32, controller_rollout=2,
    early_stop_rule="average",
    cell_epochs=1, cell_dropout=0.1, cell_batch=32, end_epochs=1, end_crop=(32, 32), key_frames=(0,))

# The demo, python train.py. Its frames have 96x128 pixels; to be done in four minutes it trains on crops.
# Mirror images would turn its camera the other way.
DEMO = dict(
    encoder_weights="none", auxiliary_cell=False, gradient_norm=0,
    static_epochs=10, static_batch=16, static_crop=(96, 96), static_scale=(0.8, 1.25),
    static_lr_encoder=2e-2, static_lr_decoder=2e-2, validate_every=5,
    input_crop=96, input_pad=0, cell_layers=3,
    search_strategy="both", search_candidates=64, search_epochs=1, search_batch=12,
    early_stop_rule="average", controller_lr=3e-3, controller_rollout=2, controller_replay=0,
    controller_epochs=2, controller_entropy=1e-2,
    cells=1, median_cell=True, cell=("concat",), cell_epochs=6, end_epochs=1, end_crop=(96, 96),
    end_mirrored=False, key_frames=(0,))

SCHEDULES = {
    ("camvid", "short"): SHORT,
    ("camvid", "smoke"): SMOKE,
    ("cityscapes", "short"): dict(
        SHORT, sequence_length=2, input_longer_side=1024, input_crop=512, cell_layers=4, key_frames=(0,)),
    ("cityscapes", "smoke"): dict(SMOKE, sequence_length=2, input_longer_side=1024, input_crop=512),
    ("synthetic", "paper"): dict(
        encoder_weights="none", static_crop=(96, 128), input_pad=0, end_crop=(96, 128)),
    ("synthetic", "short"): DEMO,
    ("synthetic", "smoke"): dict(SMOKE, encoder_weights="none"),
}
