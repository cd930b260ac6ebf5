"""Google Cloud Storage on loopback, in memory: gcp-storage-emulator, and what it leaves out.

    with serve() as variables:   # for os.environ of whatever is to use it
      ...                        # gs://bucket/...

The emulator passes over conditions on the generation of an object, and does not tell it with the
content; both are added here, as Google documents them. Its server answers one request at a time.
"""

import contextlib
import logging
import socket
from http import HTTPStatus


def _conditional(handle):
  from gcp_storage_emulator.exceptions import NotFound

  def handled(request, response, storage):
    name = request.params.get("object_id") or request.query.get("name", [""])[0]

    def generation():
      try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
      except NotFound:
        return "0"

    (wanted,) = request.query.get("ifGenerationMatch", [None])
    if wanted not in (None, generation()):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    if request.query.get("alt") == ["media"]:
      response["x-goog-generation"] = generation()
    handle(request, response, storage)

  return handled


@contextlib.contextmanager
def serve(port=0):
  """Starts a server with one empty bucket, called bucket; yields the variables that clients read.
  """
  from gcp_storage_emulator import server

  logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
  logging.getLogger("api.object").setLevel(logging.CRITICAL)
  if not port:
    with socket.create_server(("127.0.0.1", 0)) as free:
      port = free.getsockname()[1]
  whole = server.HANDLERS
  server.HANDLERS = [
      (path, {method: _conditional(handle) if "bucket_name" in path else handle
              for method, handle in handlers.items()})
      for path, handlers in whole
  ]
  running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
  running.start()
  url = f"http://127.0.0.1:{port}"
  try:
    yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url,
           "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any", "NO_GCE_CHECK": "true"}
  finally:
    running.stop()
    server.HANDLERS = whole
