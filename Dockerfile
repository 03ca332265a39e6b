# One image for nodes, drivers and servers (docs/cluster.md). The tag is the release's.
#   docker build -t cigpose-pipelines:0.1.0 .                               # GPUs; the host brings the driver
#   docker build -t cigpose-pipelines:0.1.0-cpu --build-arg DEVICE=cpu .
FROM python:3.11.14-slim-bookworm

# cuda: torch as it comes, with CUDA's libraries. cpu: torch's own index has builds without them, a tenth of the size.
ARG DEVICE=cuda
ARG CPU_WHEELS=https://download.pytorch.org/whl/cpu

# git: DVC, and the revision of a run. gcc, g++: torch.compile. wget: KubeRay's probes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends git gcc g++ libc6-dev wget \
 && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 NO_ALBUMENTATIONS_UPDATE=1 DVC_NO_ANALYTICS=1 RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/cigpose-pipelines
COPY constraints.txt ./
RUN case "$DEVICE" in \
      cuda) pip install -c constraints.txt torch ;; \
      cpu) pip install -c constraints.txt --index-url "$CPU_WHEELS" torch ;; \
      *) echo "DEVICE=$DEVICE: expected cuda or cpu" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY cigpose cigpose
COPY pipelines pipelines
RUN pip install -c constraints.txt '.[pipelines,servers]'

# nobody's root, and a folder that is theirs: params.yaml is mounted into it, or written by `cigpose use`
RUN useradd --create-home --uid 1000 cigpose && mkdir /project && chown cigpose /project
USER cigpose
WORKDIR /project
