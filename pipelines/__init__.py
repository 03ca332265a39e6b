"""Thin orchestration around the `cigpose` library: one module per DVC stage, plus Ray, MLflow and Prefect."""

import os

# No command may reach out on its own. Set before the tools are imported; child processes inherit it.
_QUIET = {
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # with the password in it, if there is one
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
