# hyaena in a container.
#
#   docker build --tag sh:test .                                                      CUDA
#   docker build --tag sh:cpu --build-arg VARIANT=cpu --build-arg TORCH_INDEX=INDEX . CPU; pytorch.org names the index
#   docker run -it --gpus all --volume "$PWD:/mnt" --rm sh:test generate "def main(" --max-new-tokens 24
#
#   VARIANT       cuda or cpu
#   TORCH_INDEX   the package index to take torch from; the default one has the CUDA build
#   EXTRAS        extras of hyaena, in brackets: EXTRAS=[hf,parquet]
#   PYTHON_IMAGE  the image of all stages

ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm
ARG VARIANT=cuda

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --constraint constraints.txt setuptools
COPY src src
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS environment
ARG VARIANT
ARG TORCH_INDEX
ARG EXTRAS
RUN python -m venv /opt/hyaena
ENV PATH=/opt/hyaena/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# torch goes in first and alone: its version is then settled, whatever build the index offers.
RUN if [ "$VARIANT" = cpu ] && [ -z "$TORCH_INDEX" ]; then \
      echo "VARIANT=cpu needs TORCH_INDEX: pytorch.org names the index of its CPU build" >&2; exit 1; \
    fi; \
    pip install --no-cache-dir --constraint constraints.txt --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/hyaena-*.whl)$EXTRAS"

FROM ${PYTHON_IMAGE} AS runtime-cpu

FROM ${PYTHON_IMAGE} AS runtime-cuda
# Triton compiles what launches its kernels. Debian keeps one version of a package, that of the image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM runtime-${VARIANT}
RUN useradd --create-home --uid 1000 hyaena
COPY --from=environment /opt/hyaena /opt/hyaena
ENV PATH=/opt/hyaena/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 1000
# Models of the hub are stored in the user's .cache: mount a volume there to keep them.
WORKDIR /mnt
HEALTHCHECK --interval=5m --timeout=30s CMD ["hyaena", "--version"]
ENTRYPOINT ["hyaena"]
CMD ["--help"]
