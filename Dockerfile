# Two images from one file:
#   docker build --target serving -t hypersphere-serving:0.1.0 .     answers requests; no torch, ray, deepspeed or mlflow
#   docker build --target trainer -t hypersphere-trainer:0.1.0 .     trains on GPUs, and on CPUs
#
# A package index other than the default comes in as a build secret, so that its address stays out of the image:
#   docker build --secret id=pip,src=$HOME/.config/pip/pip.conf --target serving .
#
# The third-party packages form a layer of their own, made from pyproject.toml and constraints.txt with empty packages
# standing in for ours: a change of our code does not install them again.

# Both images run the same Python. PyTorch 2.13 is built for CUDA 13.0; DeepSpeed wants a compiler of the same major
# version, hence "devel".
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS python


FROM python AS serving-build
WORKDIR /deps
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    mkdir trainer serving \
    && touch trainer/__init__.py serving/__init__.py README.md LICENSE \
    && python -m venv --without-pip /opt/hypersphere \
    && python -m pip --python /opt/hypersphere/bin/python install -c constraints.txt ".[serving]"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY serving serving
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /opt/hypersphere/bin/python install --no-deps --force-reinstall .


FROM python AS serving
# One embedder is mounted at /embedder, or a folder of several at /embedders; /var/lib/hypersphere holds the store.
RUN useradd --uid 10001 --create-home hypersphere \
    && install -d -o hypersphere -g hypersphere /embedder /embedders /var/lib/hypersphere
COPY --from=serving-build /opt/hypersphere /opt/hypersphere
ENV PATH="/opt/hypersphere/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    WDS_SECURE=1
USER 10001:10001
WORKDIR /home/hypersphere
VOLUME ["/var/lib/hypersphere"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=3).close()"]
ENTRYPOINT ["hypersphere", "serve"]
CMD ["--embedder", "/embedder", "--store", "/var/lib/hypersphere/gallery.sqlite", "--host", "0.0.0.0", "--port", "8000"]


FROM ${CUDA_IMAGE} AS trainer-base
# g++: DeepSpeed compiles its operators at first use. wget: the health probes of KubeRay. The libraries are
# those that the copied Python is linked against; Ubuntu's C library is newer than the one it was built with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ wget \
        libbz2-1.0 libexpat1 libffi8 libgdbm6t64 liblzma5 libncursesw6 libreadline8t64 libsqlite3-0 libssl3t64 libuuid1 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=python /usr/local/bin/ /usr/local/bin/
COPY --from=python /usr/local/include/python3.11/ /usr/local/include/python3.11/
COPY --from=python /usr/local/lib/ /usr/local/lib/
RUN ldconfig && python3.11 -c "import bz2, ctypes, lzma, readline, sqlite3, ssl, uuid, zlib"


FROM trainer-base AS trainer
WORKDIR /deps
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    mkdir trainer serving \
    && touch trainer/__init__.py serving/__init__.py README.md LICENSE \
    && python3.11 -m venv --without-pip /opt/hypersphere \
    && python3.11 -m pip --python /opt/hypersphere/bin/python install -c constraints.txt ".[trainer,serving,gpu]"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY trainer trainer
COPY serving serving
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3.11 -m pip --python /opt/hypersphere/bin/python install --no-deps --force-reinstall .
# /data holds data sets, /runs checkpoints and reports, /embedders what export writes.
RUN useradd --uid 10001 --create-home hypersphere \
    && install -d -o hypersphere -g hypersphere /data /runs /embedders
ENV PATH="/opt/hypersphere/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    WDS_SECURE=1
USER 10001:10001
WORKDIR /home/hypersphere
COPY configs configs
ENTRYPOINT ["hypersphere"]
CMD ["--help"]
