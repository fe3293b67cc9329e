// The page of the service. It uses the API as any client does; the key travels in a header and is never a cookie, so
// another site's page cannot use it. Text of others reaches the document as text only.

const content = document.getElementById("content");
const news = document.getElementById("news");
const leave = document.getElementById("leave");
const POLL_MS = 2000;
let shown = new AbortController(); // aborted when another view is shown

function tell(text, isBad = false) {
  news.textContent = text;
  news.classList.toggle("bad", isBad);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  const answer = await fetch(path, { signal: shown.signal, ...options, headers });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const error = new Error(body.error?.message ?? `The service answered ${answer.status}.`);
  error.status = answer.status;
  throw error;
}

const get = async (path) => (await ask(`/v1${path}`)).json();
const post = async (path, body) =>
  (await ask(`/v1${path}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body ?? {}) })).json();

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function show(template) {
  content.replaceChildren(document.getElementById(template).content.cloneNode(true));
  return content;
}

const clock = (seconds) => (seconds ? new Date(seconds * 1000).toLocaleString() : "");
const expectedOf = ({ dist_ft: { estimate } }) => (estimate === null ? "" : [
  `${estimate.steps} steps, about ${estimate.tokens.toLocaleString("en")} tokens`,
  estimate.seconds === null ? "" : `${Math.max(1, Math.round(estimate.seconds / 60))} min of training`,
  estimate.price === null ? "" : `price ${estimate.price.toFixed(2)}`,
].filter(Boolean).join(", "));
const progressOf = (job) => (job.dist_ft.max_steps ? `${job.dist_ft.step} of ${job.dist_ft.max_steps} steps` : "");
const isOver = (job) => ["succeeded", "failed", "cancelled"].includes(job.status);

// Calls `look` at once and then again, until it returns false or another view is shown.
async function watch(look) {
  const { signal } = shown;
  while (!signal.aborted) {
    if ((await look()) === false) return;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true, signal }));
  }
}

async function showJobs() {
  show("jobs");
  const [body, more, empty] = ["tbody", ".more", ".empty"].map((name) => content.querySelector(name));
  let limit = 20;
  more.onclick = () => { limit = Math.min(1000, limit + 100); more.disabled = true; };
  await watch(async () => {
    const page = await get(`/fine_tuning/jobs?limit=${limit}`);
    body.replaceChildren(...page.data.map(jobRow));
    empty.hidden = page.data.length > 0;
    more.hidden = !page.has_more || limit === 1000;
    more.disabled = false;
  });
}

function jobRow(job) {
  const row = element("tr");
  const link = element("a", job.user_provided_suffix ? `${job.user_provided_suffix} (${job.id})` : job.id, { href: `#/jobs/${job.id}` });
  const progress = element("td", progressOf(job));
  if (!isOver(job) && job.dist_ft.max_steps) {
    progress.prepend(element("progress", undefined, { max: job.dist_ft.max_steps, value: job.dist_ft.step, "aria-label": "Steps" }), " ");
  }
  const first = element("td");
  first.append(link);
  row.append(first, element("td", job.status), progress, element("td", job.model), element("td", clock(job.created_at)));
  return row;
}

async function showJob(id) {
  show("job");
  content.querySelector("h2").textContent = id;
  for (const button of content.querySelectorAll("[data-verb]")) button.onclick = () => act(id, button.dataset.verb);
  let report = "";
  await watch(async () => {
    const [job, events, checkpoints] = await Promise.all([
      get(`/fine_tuning/jobs/${id}`), get(`/fine_tuning/jobs/${id}/events?limit=200`), get(`/fine_tuning/jobs/${id}/checkpoints?limit=100`),
    ]);
    fillFacts(job);
    replaceIfOther(content.querySelector(".events"), events.data.map(eventItem));
    replaceIfOther(content.querySelector(".checkpoints"), checkpoints.data.map(checkpointItem));
    await fillFiles(job);
    report = await fillReport(id, report);
    return !isOver(job);
  });
}

// Leaves what is equal in place, so that focus and selection stay.
function replaceIfOther(parent, children) {
  const made = element(parent.tagName);
  made.append(...children);
  if (made.innerHTML !== parent.innerHTML) parent.replaceChildren(...children);
}

function fillFacts(job) {
  const facts = {
    Status: job.dist_ft.wanted === "run" || isOver(job) || job.status === "paused" ? job.status : `${job.status}, to ${job.dist_ft.wanted}`,
    Progress: progressOf(job), Workers: job.dist_ft.world_size, Attempts: job.dist_ft.attempts, Examples: job.dist_ft.num_examples || "",
    Expected: expectedOf(job), Best: job.dist_ft.best_checkpoint ?? "",
    Method: job.method.type, Settings: Object.entries(job.method[job.method.type].hyperparameters).map(([k, v]) => `${k} ${v}`).join(", "),
    "Base model": job.model, "Tuned model": job.fine_tuned_model, Created: clock(job.created_at),
    "Ends at about": isOver(job) ? "" : clock(job.estimated_finish), Ended: clock(job.finished_at), Tokens: job.trained_tokens, Error: job.error?.message,
  };
  const parts = Object.entries(facts).filter(([, value]) => value || value === 0);
  replaceIfOther(content.querySelector("dl"), parts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  const can = { pause: !isOver(job) && job.dist_ft.wanted === "run", resume: job.status === "paused", cancel: !isOver(job) && job.dist_ft.wanted !== "cancel" };
  for (const button of content.querySelectorAll("[data-verb]")) button.hidden = !can[button.dataset.verb];
}

function eventItem(event) {
  const item = element("li", undefined, { class: event.level });
  item.append(element("time", clock(event.created_at)), event.message);
  return item;
}

function checkpointItem(point) {
  const { train_loss: train, valid_loss: valid } = point.metrics;
  const losses = [train != null && `loss ${train.toFixed(3)}`, valid != null && `held-out ${valid.toFixed(3)}`].filter(Boolean).join(", ");
  return element("li", `${point.fine_tuned_model_checkpoint}${losses && ` (${losses})`}`);
}

async function fillFiles(job) {
  const files = job.result_files.map((file) => ["Losses of every step (CSV)", `/v1/files/${file}/content`, `${job.id}.csv`]);
  if (job.fine_tuned_model) {
    const weights = await get(`/fine_tuning/jobs/${job.id}/weights`).catch(() => ({ data: [] }));
    files.push(...weights.data.map((file) => [`${file.name} (${file.bytes.toLocaleString()} bytes)`, `/v1/fine_tuning/jobs/${job.id}/weights/${encodeURIComponent(file.name)}`, file.name]));
  }
  const list = content.querySelector(".files");
  if (list.childElementCount === files.length) return;
  list.replaceChildren(...files.map(([name, path, target]) => {
    const [item, button] = [element("li"), element("button", name, { type: "button" })];
    button.onclick = () => download(path, target);
    item.append(button);
    return item;
  }));
}

// A link cannot carry the key, so the bytes come through a blob.
async function download(path, name) {
  tell(`Loading ${name} …`);
  await reporting(async () => {
    const url = URL.createObjectURL(await (await ask(path)).blob());
    element("a", "", { href: url, download: name }).click();
    URL.revokeObjectURL(url);
    tell(`${name} is loaded.`);
  });
}

async function fillReport(id, before) {
  const text = await ask(`/v1/fine_tuning/jobs/${id}/report`).then((answer) => answer.text(), (error) => {
    if (error.status === 404) return "";
    throw error;
  });
  if (!text || text === before) return text;
  const frame = content.querySelector("iframe");
  content.querySelector(".waiting").hidden = true;
  frame.hidden = false;
  const fit = () => { frame.style.height = `${frame.contentDocument.documentElement.scrollHeight + 8}px`; };
  if (before) { // only the body is new, so that nothing flickers
    frame.contentDocument.body.replaceChildren(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
    fit();
  } else {
    frame.onload = fit;
    frame.srcdoc = text;
  }
  return text;
}

async function act(id, verb) {
  if (verb === "cancel" && !confirm("End this job without a model?")) return;
  await reporting(async () => {
    const job = await post(`/fine_tuning/jobs/${id}/${verb}`);
    fillFacts(job);
    tell(`Asked to ${verb}.`);
  });
}

async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file, file.name);
  const made = await (await ask("/v1/files", { method: "POST", body: form })).json();
  if (made.status === "error") throw new Error(`${file.name}: ${made.status_details}`);
  return made.id;
}

async function fillModels(...selects) {
  const models = (await get("/models")).data;
  for (const select of selects) select.replaceChildren(...models.map((model) => element("option", model.id)));
  return models;
}

async function showNew() {
  const form = show("new").querySelector("form");
  await fillModels(form.elements.model);
  onSubmit(form, async () => {
    const { model, method, training, validation, n_epochs, suffix } = form.elements;
    tell("Uploading …");
    const body = { model: model.value, training_file: await upload(training.files[0]) };
    if (validation.files[0]) body.validation_file = await upload(validation.files[0]);
    if (suffix.value) body.suffix = suffix.value;
    const hyperparameters = n_epochs.value ? { n_epochs: Number(n_epochs.value) } : {};
    body.method = { type: method.value, [method.value]: { hyperparameters } };
    const job = await post("/fine_tuning/jobs", body);
    location.hash = `#/jobs/${job.id}`;
  });
}

async function showTry() {
  const form = show("try").querySelector("form");
  const models = await fillModels(form.elements.left, form.elements.right);
  form.elements.right.value = models.find((model) => model.id.startsWith("ft:"))?.id ?? models[0]?.id;
  onSubmit(form, async () => {
    const { left, right, message, of_left, of_right } = form.elements;
    await Promise.all([stream(left.value, message.value, of_left), stream(right.value, message.value, of_right)]);
  });
}

async function stream(model, message, output) {
  output.value = "";
  const body = JSON.stringify({ model, stream: true, messages: [{ role: "user", content: message }], max_completion_tokens: 512 });
  const answer = await ask("/v1/chat/completions", { method: "POST", headers: { "content-type": "application/json" }, body });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((text) => text.startsWith("data: {"))) {
      const piece = JSON.parse(line.slice(6));
      if (piece.error) throw new Error(piece.error.message);
      output.value += piece.choices[0]?.delta?.content ?? "";
    }
  }
}

function onSubmit(form, act) {
  form.onsubmit = async (event) => {
    event.preventDefault();
    const button = form.querySelector("button:not([type])");
    button.disabled = true;
    tell("");
    await reporting(act);
    button.disabled = false;
  };
}

function showLogin() {
  const form = show("login").querySelector("form");
  form.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem("key", form.elements.key.value.trim());
    route();
  };
  form.elements.key.focus();
}

// Runs an action and tells its error; without a right key, asks for one.
async function reporting(act) {
  try {
    await act();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) {
      const hadKey = sessionStorage.getItem("key");
      sessionStorage.removeItem("key");
      showLogin();
      tell(hadKey ? error.message : "", true);
    } else {
      tell(error.message, true);
    }
  }
}

async function route() {
  shown.abort();
  shown = new AbortController();
  tell("");
  const path = location.hash.slice(1) || "/";
  const job = path.match(/^\/jobs\/([\w-]+)$/)?.[1];
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${path}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const views = { "/": ["Jobs", showJobs], "/new": ["New job", showNew], "/try": ["Try a model", showTry] };
  const [title, view] = job ? [job, () => showJob(job)] : (views[path] ?? views["/"]);
  document.title = `${title} · dist-ft`;
  leave.hidden = !sessionStorage.getItem("key");
  await reporting(view);
}

leave.onclick = () => {
  sessionStorage.removeItem("key");
  route();
};
window.addEventListener("hashchange", () => { content.focus(); route(); });
route();
