# The training package, for one machine or, by torchrun, for several:
#
#   docker build --file docker/training.Dockerfile --tag blip2-training:0.1.0 .
#   docker run --rm --volume "$PWD/runs:/runs" --user "$(id -u):$(id -g)" blip2-training:0.1.0 tiny --out /runs/tiny
#
# TORCH_INDEX_URL is an additional package index, as in service.Dockerfile. By default PyPI's torch is installed, with CUDA.

FROM python:3.11-slim-bookworm AS requirements
COPY pyproject.toml /
RUN python -c "import tomllib; p = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['train'], sep='\n')" > /requirements.txt


FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=""
WORKDIR /build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/*

COPY --from=requirements /requirements.txt ./
COPY constraints.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --requirement requirements.txt \
 && cd /opt/venv/lib/python3.11/site-packages/torch && rm -rf test include bin/test_* bin/protoc*
RUN python -m venv /opt/packager && /opt/packager/bin/python -m pip install --no-cache-dir 'setuptools>=77'

COPY pyproject.toml LICENSE README.md ./
COPY model model
COPY training training
# Its console scripts name the packager's Python, which the image lacks.
RUN /opt/packager/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/app . \
 && rm -r /opt/app/bin


FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="blip2-training" \
      org.opencontainers.image.description="Trains a Q-Former and its projection for BLIP-2, in two stages" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"

RUN groupadd --gid 10001 blip2 \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin blip2 \
 && install --directory --owner 10001 --group 10001 /runs
COPY --from=build /usr/bin/tini-static /usr/local/bin/tini
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/app /opt/app

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/app
USER 10001:10001
ENTRYPOINT ["tini", "--", "python", "-m", "training"]
CMD ["--help"]
