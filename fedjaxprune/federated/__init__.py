"""Clients and server; takes masks as given."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(
    __name__,
    modules=(
        "aggregators attacks batch_norm cohort corrections downlinks early_stopping extrusion "
        "gated_updates "
        "local_training optimizers penalties personalization sampling server_optimizers "
        "sparse_gradients squared_gradients step_scales uplinks weight_views"
    ),
)
