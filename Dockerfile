# The measuring environment for an NVIDIA GPU:
#   docker build --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" -t diffusion-fast .
#   mkdir -p spool && docker run --rm --gpus all --user "$(id -u)" --env HOME=/tmp -v "$PWD/spool:/work/spool" \
#       diffusion-fast ladder --model sdxl --no-track
# Results belong to whoever ran it, and `diffusion-fast sync spool` records them outside.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Triton compiles its launchers with a C compiler; Python's headers are for it too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

COPY requirements.lock /src/
RUN pip install --no-cache-dir --requirement /src/requirements.lock
COPY pyproject.toml README.md LICENSE /src/
COPY diffusion_fast /src/diffusion_fast
RUN pip install --no-cache-dir --no-deps /src

RUN useradd --create-home --uid 10001 measurer && install --directory --owner measurer /work
# Which commit a result came from: the image has no history to ask.
ARG COMMIT=""
ENV DIFFUSION_FAST_COMMIT=$COMMIT

USER measurer
WORKDIR /work
ENTRYPOINT ["diffusion-fast"]
CMD ["--help"]
