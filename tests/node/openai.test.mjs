// The service as the unchanged `openai` client for Node sees it. DIST_FT_URL and DIST_FT_KEY name a server whose training
// is a stand-in (tests/contracts/test_node_client.py starts it).

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.env.DIST_FT_URL}/v1`, apiKey: process.env.DIST_FT_KEY, maxRetries: 0 });
const row = JSON.stringify({ messages: [{ role: "user", content: "How many?" }, { role: "assistant", content: "Four." }] });
const rows = `${row}\n`.repeat(12);
const upload = () => toFile(Buffer.from(rows), "größe.jsonl").then((file) => client.files.create({ file, purpose: "fine-tune" }));

async function ended(id) {
  for (;;) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (["succeeded", "failed", "cancelled", "paused"].includes(job.status)) return job;
  }
}

test("a file goes in, is listed and comes back", async () => {
  const made = await upload();
  assert.deepEqual([made.object, made.filename, made.bytes, made.status], ["file", "größe.jsonl", rows.length, "processed"]);
  const listed = [];
  for await (const file of client.files.list({ limit: 1 })) listed.push(file.id);
  assert.ok(listed.includes(made.id));
  assert.equal(await (await client.files.content(made.id)).text(), rows);
  assert.deepEqual(await client.files.delete(made.id), { id: made.id, object: "file", deleted: true });
  await assert.rejects(client.files.retrieve(made.id), (error) => error instanceof OpenAI.NotFoundError && error.param === "id");
});

test("an upload in parts becomes a file", async () => {
  const upload = await client.uploads.create({ bytes: rows.length, filename: "t.jsonl", mime_type: "text/jsonl", purpose: "fine-tune" });
  const part = async (text) => client.uploads.parts.create(upload.id, { data: await toFile(Buffer.from(text), "part") });
  const [second, first] = [await part(rows.slice(100)), await part(rows.slice(0, 100))];
  const done = await client.uploads.complete(upload.id, { part_ids: [first.id, second.id] });
  assert.equal(done.status, "completed");
  assert.equal(await (await client.files.content(done.file.id)).text(), rows);
});

test("a job runs to its model, with events, checkpoints and a result file", async () => {
  const file = await upload();
  const model = (await client.models.list()).data[0].id;
  const made = await client.fineTuning.jobs.create({
    model, training_file: file.id, validation_file: file.id, suffix: "node", seed: 1, metadata: { by: "node" },
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2 } } },
  });
  assert.deepEqual([made.object, made.method.type, made.metadata.by], ["fine_tuning.job", "supervised", "node"]);
  const job = await ended(made.id);
  assert.equal(job.status, "succeeded");
  assert.match(job.fine_tuned_model, /^ft:.*:node:/);
  const events = [];
  for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 3 })) events.push(event.message);
  assert.equal(events[0], "The job has successfully completed");
  assert.equal(new Set(events).size, events.length);
  const checkpoints = (await client.fineTuning.jobs.checkpoints.list(job.id)).data;
  assert.equal(checkpoints[0].step_number, 24);
  assert.match(await (await client.files.content(job.result_files[0])).text(), /^step,train_loss,/);
  assert.equal((await client.models.retrieve(job.fine_tuned_model)).id, job.fine_tuned_model);
  assert.ok((await client.fineTuning.jobs.list({ limit: 1 })).data.length === 1);
  assert.equal((await client.models.delete(job.fine_tuned_model)).deleted, true);
});

test("a job is cancelled, and errors have their classes", async () => {
  const file = await upload();
  const made = await client.fineTuning.jobs.create({ model: "tiny-random", training_file: file.id, seed: 13 });
  await client.fineTuning.jobs.cancel(made.id);
  assert.equal((await ended(made.id)).status, "cancelled");
  await assert.rejects(client.fineTuning.jobs.cancel(made.id), OpenAI.BadRequestError);
  await assert.rejects(client.fineTuning.jobs.create({ model: "none", training_file: file.id }), (error) => error.code === "model_not_found");
  await assert.rejects(new OpenAI({ baseURL: client.baseURL, apiKey: "sk-wrong" }).models.list(), OpenAI.AuthenticationError);
});
