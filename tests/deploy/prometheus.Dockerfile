# Debian's Prometheus in the place of the official image, for an engine that reaches no registry.
FROM python:3.11-slim-bookworm
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus \
 && install --directory --owner 65534 --group 65534 /prometheus
USER 65534
EXPOSE 9090
ENTRYPOINT ["prometheus"]
