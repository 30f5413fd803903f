/* Continues token numbers with a model, and prints the numbers as they come.
 *
 *     generate FOLDER COUNT TOKEN...
 *
 * It always takes the most probable token. To compile it against an installed library:
 *
 *     cc generate.c $(pkg-config --cflags --libs bkcore) -o generate
 */
#include <bkcore.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(const char *what) {
  fprintf(stderr, "generate: %s\n", what);
  return 1;
}

static int print_token(void *context, int64_t sequence, int64_t token) {
  (void)context, (void)sequence;
  printf("%" PRId64 "\n", token);
  return fflush(stdout) == 0; /* ends if nobody reads any more */
}

/* Whether a text is a number, which is stored. */
static int read_number(const char *text, int64_t *number) {
  char *end;
  errno = 0;
  *number = strtoll(text, &end, 10);
  return end != text && *end == '\0' && errno == 0;
}

static int run(const char *folder, int64_t most, const int64_t *tokens, int64_t count) {
  bkcore_engine *engine = NULL;
  bkcore_state *state = NULL;
  bkcore_generation generation = {0};
  bkcore_status status;

  generation.most_tokens = most;
  generation.sampling = bkcore_default_sampling();
  generation.sampling.temperature = 0;
  status = bkcore_open(folder, 1, NULL, &engine);
  if (status == BKCORE_OK) status = bkcore_state_new(engine, 1, &state);
  if (status == BKCORE_OK)
    status = bkcore_generate(engine, state, tokens, 1, count, &generation, print_token, NULL);
  bkcore_state_free(state);
  bkcore_close(engine);
  return status == BKCORE_OK ? 0 : fail(bkcore_error_message());
}

int main(int count, char **arguments) {
  int64_t most, *tokens;
  int i, result;

  if (count < 4 || !read_number(arguments[2], &most))
    return fail("usage: generate FOLDER COUNT TOKEN...");
  tokens = malloc((size_t)(count - 3) * sizeof *tokens);
  if (!tokens) return fail("there is not enough memory");
  for (i = 3; i < count; ++i)
    if (!read_number(arguments[i], &tokens[i - 3])) {
      free(tokens);
      return fail("tokens are numbers");
    }
  result = run(arguments[1], most, tokens, count - 3);
  free(tokens);
  return result;
}
