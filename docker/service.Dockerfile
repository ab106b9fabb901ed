# The service, with the embedded default model inside. Two targets:
#
#   docker build --file docker/service.Dockerfile --target cpu  --tag blip2-server:0.1.0 .
#   docker build --file docker/service.Dockerfile --target cuda --tag blip2-server:0.1.0-cuda --build-arg EXTRAS="spread quantize" .
#
# TORCH_INDEX_URL is an additional package index; empty: the usual index only. PyPI's torch for Linux on x86 requires several
# gigabytes of CUDA libraries, for the target cuda. PyTorch's index of CPU builds has the same version without them, for the
# target cpu.

# Only the list of dependencies: other changes of pyproject.toml do not install them again.
FROM python:3.11-slim-bookworm AS requirements
ARG EXTRAS=""
COPY pyproject.toml /
RUN python -c "import sys, tomllib; p = tomllib.load(open('/pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(d for e in sys.argv[1].split() for d in p['optional-dependencies'][e]), sep='\n')" "$EXTRAS" \
      > /requirements.txt


FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=""
WORKDIR /build
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/*

# Dependencies precede the code, so that a change of code rebuilds in seconds. The runtime does not use pip, torch's tests,
# headers or compilers: they are left out.
COPY --from=requirements /requirements.txt ./
COPY constraints.txt ./
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --requirement requirements.txt \
 && cd /opt/venv/lib/python3.11/site-packages/torch && rm -rf test include bin/test_* bin/protoc*
RUN python -m venv /opt/packager && /opt/packager/bin/python -m pip install --no-cache-dir 'setuptools>=77'

# The code is installed, not copied, so that it has its metadata, licence, weights and bytecode.
COPY pyproject.toml LICENSE README.md ./
COPY model model
COPY service service
# Its console scripts name the packager's Python, which the image lacks.
RUN /opt/packager/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/app . \
 && rm -r /opt/app/bin


FROM python:3.11-slim-bookworm AS cpu
LABEL org.opencontainers.image.title="blip2-server" \
      org.opencontainers.image.description="A BLIP-2 inference service: captions, visual questions, image-text retrieval" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"

# The user owns the directory, so a volume that is mounted there for the first time belongs to the user too.
RUN groupadd --gid 10001 blip2 \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin blip2 \
 && install --directory --owner 10001 --group 10001 /var/cache/huggingface
COPY --from=build /usr/bin/tini-static /usr/local/bin/tini
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/app /opt/app

# Weights of the Hub are in HF_HOME, the mount point of a volume. They are downloaded only if HF_HUB_OFFLINE is 0.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/var/cache/huggingface \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    BLIP2_HOST=0.0.0.0 \
    BLIP2_PORT=8000

WORKDIR /opt/app
# Numeric, so that Kubernetes can verify that it is not root.
USER 10001:10001
EXPOSE 8000
# http.client, not urllib: the check must ignore a proxy of the environment.
HEALTHCHECK --interval=5s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
c = http.client.HTTPConnection('127.0.0.1', int(os.environ['BLIP2_PORT']), timeout=4); \
c.request('GET', '/readyz'); \
sys.exit(c.getresponse().status != 200)"]
# As process 1, the service would ignore signals until it has set its handlers.
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "service"]


# The same with the variables of NVIDIA's container runtime; the driver is the host's.
FROM cpu AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
