/* bkcore in C: language models of bkcore, read and run without Python or PyTorch.
 *
 * A model is a folder with config.json and model.safetensors, as `bkcore train`, `bkcore quantize`
 * and `save_pretrained` write it. Tokens are numbers; the tokenizer is tokenizer.json in the same
 * folder, which any library for that format reads.
 *
 *     bkcore_engine *engine;
 *     bkcore_state *state;
 *     if (bkcore_open("checkpoints/wikitext2", 1, NULL, &engine) != BKCORE_OK ||
 *         bkcore_state_new(engine, 1, &state) != BKCORE_OK) {
 *       fprintf(stderr, "%s\n", bkcore_error_message());
 *       return 1;
 *     }
 *     ... bkcore_read(), bkcore_generate() ...
 *     bkcore_state_free(state);
 *     bkcore_close(engine);
 *
 * Errors. Functions that can fail return a bkcore_status, and write their results only if it is
 * BKCORE_OK. bkcore_error_message() then says what is wrong, and how to mend it. NULL is an error
 * unless a function says what it means. What was opened and made must be closed and freed by its
 * own function, which accept NULL.
 *
 * Arrays. They are contiguous, and the last axis runs fastest: in (batch, sites) the tokens of a
 * sequence are side by side. Their sizes are arguments, which are compared with what is needed.
 *
 * Threads. Functions may be called from any thread. Readings by one engine wait for each other. One
 * state, and one sampler, may be used by one thread at a time. After a fork the child may go on
 * with what it has, if no other thread was in a function of this library at that moment.
 *
 * The same tokens give the same bits, whatever the number of threads and of sequences in a batch.
 */
#ifndef BKCORE_H
#define BKCORE_H

#include <stdint.h>

#if defined(__GNUC__)
#define BKCORE_API __attribute__((visibility("default")))
#else
#define BKCORE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns: one of these numbers. */
typedef int bkcore_status;
enum {
  BKCORE_OK = 0,
  BKCORE_INPUT_ERROR = 1, /* an argument that cannot be; nothing was changed */
  BKCORE_CHECKPOINT_ERROR =
      2,                   /* a file that is missing, damaged, of another kind or not writable */
  BKCORE_MEMORY_ERROR = 3, /* there is not enough memory */
  BKCORE_ERROR = 4         /* all else: threads cannot be started, logits are not finite */
};

/* The version of the library, such as "0.1.0". */
BKCORE_API const char *bkcore_version(void);

/* What went wrong in the last call of this thread that failed: one line, at most 1023 bytes, in
 * English. "" if none has failed. Valid until another call of this thread fails. */
BKCORE_API const char *bkcore_error_message(void);

/* ---- Models ---------------------------------------------------------------------------------- */

/* An open model and its threads. */
typedef struct bkcore_engine bkcore_engine;

/* Opens a folder. Weights stay in the file, which is mapped into memory and must not be changed or
 * shortened meanwhile; replacing it by another one of that name is fine.
 *
 * Sizes, names, shapes and dtypes are compared with the configuration, so that the folder may be a
 * stranger's. A checksum of the weights is not computed.
 *
 * threads: 1 to 1024 threads that compute, the calling one among them. They are started by the
 * first reading. More than there are cores make it slower. isa: the instruction set: "avx512",
 * "avx2" or "baseline" on x86-64. NULL takes the best that this processor has. Logits of different
 * ones may differ by rounding.
 *
 * BKCORE_INPUT_ERROR: threads is out of range, or the processor lacks the instruction set.
 * BKCORE_CHECKPOINT_ERROR: the folder holds no model that can be read; the message says why. */
BKCORE_API bkcore_status bkcore_open(const char *folder, int64_t threads, const char *isa,
                                     bkcore_engine **engine);

/* Ends the threads and forgets the model. States and samplers stay valid. */
BKCORE_API void bkcore_close(bkcore_engine *engine);

/* What bkcore_size() gives. */
typedef int bkcore_quantity;
enum {
  BKCORE_VOCABULARY = 0,  /* tokens are numbers from 0 to below this */
  BKCORE_THREADS = 1,     /* as opened */
  BKCORE_STATE_BYTES = 2, /* memory of one sequence's state, whatever its length */
  BKCORE_WIDTH = 3,       /* of the residual stream */
  BKCORE_LAYERS = 4,
  BKCORE_HEADS = 5,
  BKCORE_KEY_GROUPS = 6, /* groups of heads that share queries and keys */
  BKCORE_KEY_SIZE = 7,
  BKCORE_VALUE_SIZE = 8,
  BKCORE_CONV_WIDTH = 9, /* taps of the short convolutions */
  BKCORE_EXPERTS = 10,   /* of a layer */
  BKCORE_EXPERTS_PER_TOKEN = 11
};

/* One size of a model.
 *
 * BKCORE_INPUT_ERROR: there is no such quantity. */
BKCORE_API bkcore_status bkcore_size(const bkcore_engine *engine, bkcore_quantity quantity,
                                     int64_t *size);

/* The instruction set that an engine uses, valid until it is closed; NULL for NULL. */
BKCORE_API const char *bkcore_isa(const bkcore_engine *engine);

/* ---- States ---------------------------------------------------------------------------------- */

/* What a model remembers of a batch of sequences: memory of fixed size, however long they are. */
typedef struct bkcore_state bkcore_state;

/* Makes the state of `batch` sequences, 1 to 2^20, before their first token. */
BKCORE_API bkcore_status bkcore_state_new(const bkcore_engine *engine, int64_t batch,
                                          bkcore_state **state);

/* Copies a state. Two texts can so go on from one beginning, which is read once. */
BKCORE_API bkcore_status bkcore_state_copy(const bkcore_state *state, bkcore_state **copy);

/* Makes a state of some sequences of another one, in any order and possibly repeated.
 *
 * sequences: (count), each from 0 to below the number that `state` has. count: 1 to 2^20. */
BKCORE_API bkcore_status bkcore_state_select(const bkcore_state *state, const int64_t *sequences,
                                             int64_t count, bkcore_state **selected);

/* Makes a state of all sequences of several ones, which may have different lengths, one state's
 * after the other's. So texts of different lengths are read one by one and go on together.
 *
 * states: (count), at least one, of models of the same sizes, with at most 2^20 sequences. */
BKCORE_API bkcore_status bkcore_state_join(const bkcore_state *const *states, int64_t count,
                                           bkcore_state **joined);

/* Frees a state. */
BKCORE_API void bkcore_state_free(bkcore_state *state);

/* The number of sequences of a state. */
BKCORE_API bkcore_status bkcore_state_batch(const bkcore_state *state, int64_t *batch);

/* How many tokens each sequence has read: seen (batch). */
BKCORE_API bkcore_status bkcore_state_seen(const bkcore_state *state, int64_t *seen, int64_t batch);

/* Writes a state to a file, completely or not at all: it is written under another name in the same
 * folder and then renamed, over a file that is there. The format is that of
 * bkcore.model.StreamState.save in Python: safetensors, in float32.
 *
 * BKCORE_CHECKPOINT_ERROR: the file cannot be written. */
BKCORE_API bkcore_status bkcore_state_save(const bkcore_state *state, const char *path);

/* Reads a state that bkcore_state_save() or StreamState.save wrote, bit for bit.
 *
 * BKCORE_CHECKPOINT_ERROR: it is not the state, in float32, of a model of this size. */
BKCORE_API bkcore_status bkcore_state_load(const bkcore_engine *engine, const char *path,
                                           bkcore_state **state);

/* ---- Reading --------------------------------------------------------------------------------- */

/* Reads tokens, which the state then remembers, and gives the logits of the next ones.
 *
 * tokens: (batch, sites), the same number, at least one, for each sequence of the state.
 * logits: (batch, vocabulary), after the last token of each sequence. `count` is the number of
 *     floats there is memory for, which must be batch * vocabulary. NULL and 0: they are not
 * wanted.
 *
 * BKCORE_INPUT_ERROR: a token is none of the vocabulary, a size is wrong, there are more than 2^40
 *     tokens, the state belongs to a model of other sizes, or a sequence would have read more than
 *     2^62. The state stays as it was.
 * BKCORE_MEMORY_ERROR, BKCORE_ERROR: the state may have read a part of the tokens, and should be
 *     freed. */
BKCORE_API bkcore_status bkcore_read(bkcore_engine *engine, bkcore_state *state,
                                     const int64_t *tokens, int64_t batch, int64_t sites,
                                     float *logits, int64_t count);

/* As bkcore_read(), with the logits after every token: (batch, sites, vocabulary). They score a
 * text: those after one token are for the next. */
BKCORE_API bkcore_status bkcore_read_all(bkcore_engine *engine, bkcore_state *state,
                                         const int64_t *tokens, int64_t batch, int64_t sites,
                                         float *logits, int64_t count);

/* ---- Sampling -------------------------------------------------------------------------------- */

/* How a token is chosen. The steps are those of `generate` in transformers, in its order, which is
 * the order here. Of equal logits the lowest token comes first. */
typedef struct bkcore_sampling {
  double repetition_penalty; /* above 0; logits of seen tokens are divided by it if positive, and
                                multiplied if negative; 1: none */
  double temperature;        /* at least 0; logits are divided by it; 0: the most probable token */
  int64_t top_k;             /* at least 0: keeps so many tokens; 0: all */
  double top_p; /* 0 to 1: keeps the fewest tokens of at least this probability; 1: all */
  double min_p; /* 0 to 1: keeps those at least this times as probable as the most
                   probable one; 0: all */
} bkcore_sampling;

/* Draws as the model predicts: temperature 1, and no penalty or filter. */
BKCORE_API bkcore_sampling bkcore_default_sampling(void);

/* Settings, random numbers, and which tokens one sequence has seen. */
typedef struct bkcore_sampler bkcore_sampler;

/* Makes a sampler. The same settings, seed and logits give the same tokens on every processor: the
 * numbers are those of xoshiro256** started by SplitMix64.
 *
 * vocabulary: 1 to 2^31 - 1 tokens.
 *
 * BKCORE_INPUT_ERROR: a setting is out of range. */
BKCORE_API bkcore_status bkcore_sampler_new(int64_t vocabulary, const bkcore_sampling *sampling,
                                            uint64_t seed, bkcore_sampler **sampler);

/* Frees a sampler. */
BKCORE_API void bkcore_sampler_free(bkcore_sampler *sampler);

/* Has the repetition penalty apply to tokens (count), such as those of the prompt.
 *
 * BKCORE_INPUT_ERROR: a token is none of the vocabulary. */
BKCORE_API bkcore_status bkcore_sampler_see(bkcore_sampler *sampler, const int64_t *tokens,
                                            int64_t count);

/* Chooses a token, which the sampler has then seen.
 *
 * logits: (vocabulary). -infinity makes a token impossible.
 *
 * BKCORE_INPUT_ERROR: `vocabulary` is not that of the sampler.
 * BKCORE_ERROR: a logit is NaN or infinity, or no token is possible. */
BKCORE_API bkcore_status bkcore_sampler_sample(bkcore_sampler *sampler, const float *logits,
                                               int64_t vocabulary, int64_t *token);

/* ---- Generating ------------------------------------------------------------------------------ */

/* What to generate. */
typedef struct bkcore_generation {
  int64_t most_tokens; /* of each sequence, at least 1 */
  const int64_t
      *stops; /* (stop_count) tokens that end their sequence; may be NULL if there are 0 */
  int64_t stop_count;
  bkcore_sampling sampling;
  uint64_t seed; /* sequence b gets the tokens that it would get alone with the seed `seed + b` */
} bkcore_generation;

/* Called for every token as soon as those of all sequences are chosen, by the thread that called
 * bkcore_generate(). All sequences get their n-th token before one gets the next.
 *
 * context: as given. sequence: its number in the state. token: a stop token is passed, too.
 *
 * Returns 0 to end this sequence, else another number. It may call functions of this library, but
 * must not use the state that is being continued, throw or jump out. */
typedef int (*bkcore_on_token)(void *context, int64_t sequence, int64_t token);

/* Reads a prompt, and then chooses and reads tokens until every sequence has ended: by its
 * callback, by a stop token, or by its number of tokens. The penalty applies to the tokens of the
 * prompt, and to those that were generated.
 *
 * tokens: the prompt (batch, sites), at least one token for each sequence of the state.
 *
 * Afterwards each sequence has read its prompt and its tokens but the last. To go on, read that one
 * and what comes next.
 *
 * BKCORE_INPUT_ERROR: as bkcore_read(), or a setting is out of range.
 * BKCORE_ERROR: as bkcore_read() or, after the prompt, as bkcore_sampler_sample(). In the second
 *     case no sequence got a token of that round, and those that had not ended have read all that
 *     they got; bkcore_state_seen() counts them.
 * BKCORE_MEMORY_ERROR: as bkcore_read(). */
BKCORE_API bkcore_status bkcore_generate(bkcore_engine *engine, bkcore_state *state,
                                         const int64_t *tokens, int64_t batch, int64_t sites,
                                         const bkcore_generation *generation,
                                         bkcore_on_token on_token, void *context);

#ifdef __cplusplus
}
#endif

#endif
