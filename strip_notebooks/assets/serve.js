'use strict'
// The page of `clot serve`. Whatever comes from the server or from a file is text: it goes in by textContent alone.
const at = id => document.getElementById(id)
const endings = document.body.dataset.endings.split(' ')
const colors = document.body.dataset.colors.split(' ')
const shown_by_browsers = ['.png', '.jpg', '.jpeg', '.bmp', '.webp']
const extras = ['uncertainty', 'explain']       // in the order in which the server looks at them
const longest_wait = 30                         // seconds
let key = ''                                    // in memory only
let model = null                                // from /model
let queue = []                                  // groups of images that wait; one is sent at a time
let working = false
let stop = new AbortController()                // ends what runs when everything is removed
const reasons = new Map()                       // of one model: what it cannot say -> why
const count = {all: 0, done: 0, refused: 0}

function make(tag, text, name) {
  const node = document.createElement(tag)
  if (text !== undefined) node.textContent = text
  if (name) node.className = name
  return node
}
function plural(n, word) { return `${n} ${word}${n === 1 ? '' : 's'}` }
function ending(name) {
  const found = endings.filter(e => name.toLowerCase().endsWith(e))
  return found.sort((a, b) => b.length - a.length)[0] || ''
}
function say(text) { at('status').textContent = text }
function wait(seconds, signal) {
  return new Promise(resolve => { setTimeout(resolve, 1000 * seconds); signal.addEventListener('abort', resolve) })
}

// --- requests

class Refused extends Error {                   // the server's sentence, or ours if there is no server
  constructor(message, status = 0, code = '', id = '') { super(message); Object.assign(this, {status, code, id}) }
}
async function refusal_of(response) {
  try {
    const {message, code, request_id} = (await response.json()).error
    return new Refused(message, response.status, code, request_id)
  } catch { return new Refused(`The server responded with status ${response.status} and no reason.`, response.status) }
}
async function fetched(path, options, signal) {
  const headers = key ? {'X-API-Key': key} : {}
  try { return await fetch(path, {...options, headers, signal}) }
  catch (error) {
    if (signal.aborted) throw error
    throw new Refused('The server did not respond: it may be down, or the files may be larger than it reads.')
  }
}
async function ask(path, options, signal) {     // the answer, once the server has time and its key
  for (let tries = 0; ; tries++) {
    const shown = key
    const response = await fetched(path, options, signal)
    if (response.ok) return await response.json()
    const refused = await refusal_of(response)
    if (response.status === 401) await new_key(shown, refused, signal)
    else if (([429, 503].includes(response.status) || response.headers.get('retry-after')) && tries < 20) {
      const seconds = Math.min(longest_wait, Math.max(1, Number(response.headers.get('retry-after')) || 1))
      say(`${refused.message} Next try in ${plural(seconds, 'second')}.`)
      await wait(seconds, signal)
    } else throw refused
    if (signal.aborted) throw new Refused('Removed.')
  }
}
let key_given = null
async function new_key(shown, refused, signal) { // returns when there is another key than the one that was shown
  if (key !== shown) return
  at('key-form').hidden = false
  at('key-hint').textContent = `${shown ? refused.message : 'The server asks for a key.'} This page keeps it in memory only, until the page is closed.`
  say(shown ? refused.message : 'The server asks for a key.')
  if (shown || document.activeElement === document.body) at('key').focus()
  await new Promise(resolve => {
    const before = key_given
    key_given = () => { if (before) before(); resolve() }
    signal.addEventListener('abort', resolve)
  })
}
at('key-form').addEventListener('submit', event => {
  event.preventDefault()
  key = at('key').value.trim()
  at('key').value = ''
  at('key-form').hidden = true
  at('files').focus()
  say('')
  const given = key_given
  key_given = null
  if (given) given(); else show_model()
})

// --- the model

async function show_model() {
  try { model = await ask('model', {}, new AbortController().signal) }
  catch (refused) { at('model-name').textContent = refused.message; return }
  const {model: about, served} = model
  if (served.sha256 !== reasons.of) reasons.clear()
  reasons.of = served.sha256
  at('model-name').textContent = `${served.arch} for ${about.classes.join(', ')}`
  const facts = {version: served.version, 'SHA-256': served.sha256, runtime: served.runtime}
  if (about.classes.length === 2) facts.threshold = `${about.positive} if its probability is ${about.threshold.toFixed(3)} or more`
  at('model-facts').replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [make('dt', name), make('dd', value)]))
}
function color(name) {                          // as in every figure: in sorted order of the names
  const names = (model ? [...model.model.classes] : []).sort()
  return colors[Math.max(0, names.indexOf(name)) % colors.length]
}

// --- what an answer looks like

function bars(answer) {
  const box = make('div', undefined, 'bars')
  for (const [name, p] of Object.entries(answer.probabilities)) {
    const bar = make('div', undefined, 'bar'), level = make('span')
    bar.setAttribute('aria-hidden', 'true')
    level.style.width = `${100 * p}%`
    level.style.background = color(name)
    bar.append(level)
    const spread = answer.uncertainty && answer.uncertainty[name]
    if (spread != null) {
      const low = Math.max(0, p - spread), high = Math.min(1, p + spread), line = make('span', undefined, 'spread')
      line.style.left = `${100 * low}%`
      line.style.width = `${100 * (high - low)}%`
      bar.append(line)
    }
    box.append(make('span', name), bar, make('span', p.toFixed(3) + (spread != null ? ` (SD ${spread.toFixed(3)})` : ''), 'number'))
  }
  return box
}
function set_words(set, what) {
  if (set === null) return 'The model has no prediction sets.'
  if (set === 'abstain') return `Abstain: the prediction set of this ${what} is not one class.`
  return `Prediction set: ${set.join(', ')} alone.`
}
function outlier_part(outlier) {
  if (outlier === null) return make('p', 'The model does not look for outliers.', 'about')
  if (outlier === true) return make('p', 'Outlier: an image is unlike the training images. Do not rely on this prediction.', 'warning')
  if (outlier === false) return make('p', 'No image is an outlier.', 'about')
  const numbers = `distance ${outlier.score.toFixed(2)}, limit ${outlier.limit.toFixed(2)}`
  if (outlier.flag) return make('p', `Outlier: unlike the training images (${numbers}). Do not rely on this prediction.`, 'warning')
  return make('p', `No outlier (${numbers}).`, 'about')
}
function class_part(answer, what) {
  const set = make('p', set_words(answer.prediction_set, what), answer.prediction_set === 'abstain' ? 'warning' : '')
  return [make('p', `${answer.class_name}, confidence ${answer.confidence.toFixed(3)}`, 'class'), bars(answer), set, outlier_part(answer.outlier)]
}
function request_line(id, ms) {
  const line = make('p', 'Request ', 'about')
  line.append(make('code', id), ms === undefined ? '.' : `, ${Math.round(ms)} ms. Research use only.`)
  return line
}
function refused_part(error) {
  return [make('p', 'No prediction', 'class'), make('p', error.message, 'warning'), ...(error.request_id ? [request_line(error.request_id)] : [])]
}
function picture(source, text, caption) {
  const figure = make('figure'), image = make('img')
  image.alt = text
  image.decoding = 'async'
  image.src = source
  figure.append(image, make('figcaption', caption))
  return figure
}

// --- one image

class Card {
  constructor(file) {
    this.file = file
    this.node = make('article')
    this.pictures = make('div', undefined, 'pictures')
    this.said = make('div')
    this.node.append(make('h3', file.name), this.pictures, this.said)
    this.pictures.append(this.thumbnail())
    this.write([make('p', 'Waiting …', 'about')])
  }
  thumbnail() {
    const none = make('div', `no preview${ending(this.file.name) ? ` of ${ending(this.file.name)}` : ''}`, 'none')
    if (!shown_by_browsers.includes(ending(this.file.name))) { const figure = make('figure'); figure.append(none); return figure }
    const address = URL.createObjectURL(this.file), figure = picture(address, 'The image', 'image'), image = figure.firstChild
    image.addEventListener('load', () => URL.revokeObjectURL(address))
    image.addEventListener('error', () => { URL.revokeObjectURL(address); image.replaceWith(none) })
    return figure
  }
  write(parts) { this.said.replaceChildren(...parts) }
  show(answer, notes) {
    this.write([...class_part(answer, 'image'), ...notes.map(text => make('p', text, 'warning')), request_line(answer.request_id, answer.time_ms)])
    if (answer.overlay) {
      const text = `The image with a heat map of ${answer.class_name}`
      const caption = `heat map: the more yellow a place, the more it speaks for ${answer.class_name}`
      this.pictures.append(picture(`data:image/png;base64,${answer.overlay}`, text, caption))
    }
    count.done++
  }
  refuse(error) { this.write(refused_part(error)); count.done++; count.refused++ }
}

// --- sending

function form_of(group, asked) {                // no name of a file leaves this page
  const form = new FormData(), many = group.together
  for (const card of group.cards) {
    form.append(many ? 'files' : 'file', card.file, 'image' + ending(card.file.name))
    if (many) form.append('patient_id', 'patient')
  }
  for (const name of asked) form.append(name, 'true')
  return form
}
async function readable(card) {                 // a folder, or a file that has changed, cannot be read
  try { await card.file.slice(0, 1).arrayBuffer(); return true }
  catch { card.refuse({message: 'The file cannot be read: it is a folder, or it was changed or moved.'}); return false }
}
async function answer_of(group) {               // the answer, and why it lacks what was asked
  let asked = group.asked.filter(name => !reasons.has(name))
  const path = group.together ? 'batch_predict' : 'predict'
  for (;;) {
    try { return [await ask(path, {method: 'POST', body: form_of(group, asked)}, group.signal), group.asked.filter(n => reasons.has(n)).map(n => reasons.get(n))] }
    catch (refused) {
      if (refused.status !== 422 || refused.code !== 'unsupported' || !asked.length) throw refused
      await show_model()                        // another one may be served since the page was opened
      const lacking = model && asked.find(name => !model.served[name])
      if (!lacking) throw refused
      reasons.set(lacking, refused.message)
      asked = asked.filter(name => name !== lacking)
    }
  }
}
function patient_card(patient, answer) {
  const node = make('article', undefined, 'patient'), title = make('h3', 'The patient'), said = make('div')
  if (patient.error) said.append(...refused_part(patient.error))
  else said.append(...class_part(patient, 'patient'), request_line(answer.request_id, answer.time_ms))
  if (patient.n_unreadable) said.prepend(make('p', `${plural(patient.n_unreadable, 'file')} could not be read.`, 'warning'))
  said.prepend(make('p', `From ${plural(patient.n_images, 'image')}.`, 'about'))
  node.append(title, said)
  return node
}
function show_group(group, answer, notes) {
  if (!group.together) return group.cards[0].show(answer, notes)
  group.cards.forEach((card, k) => {
    const result = answer.results[k]
    if (result.error) card.refuse(result.error); else card.show(result, notes)
  })
  group.cards[0].node.before(patient_card(answer.patients[0], answer))
}
async function send(group) {
  const good = await Promise.all(group.cards.map(readable))
  group.cards = group.cards.filter((_, k) => good[k])
  if (!group.cards.length) return
  for (const card of group.cards) card.write([make('p', 'Sent …', 'about')])
  try {
    const [answer, notes] = await answer_of(group)
    if (group.signal.aborted) return
    if (!model || model.served.sha256 !== answer.model.sha256) await show_model()
    show_group(group, answer, notes)
  } catch (refused) {
    if (group.signal.aborted) return
    if (!(refused instanceof Refused)) throw refused
    for (const card of group.cards) card.refuse({message: refused.message, request_id: refused.id})
  }
}
function say_count() {
  const all = plural(count.all, 'image'), good = count.done - count.refused
  const refused = count.refused ? `, ${count.refused} refused` : ''
  if (count.done < count.all) say(`${all}: ${good} ready${refused}, ${count.all - count.done} to do …`)
  else say(`${all}: ${count.refused ? good : 'all'} ready${refused}.`)
}
async function work() {
  if (working) return
  working = true
  while (queue.length) {
    await send(queue.shift())
    if (count.all) say_count()
  }
  working = false
}
function add(files) {
  if (!files.length) return
  const cards = [...files].map(file => new Card(file)), together = at('together').checked
  const more = {asked: extras.filter(name => at(name).checked), together, signal: stop.signal}
  at('results').append(...cards.map(card => card.node))
  queue.push(...(together ? [{cards, ...more}] : cards.map(card => ({cards: [card], ...more}))))
  count.all += cards.length
  at('clear').hidden = false
  say_count()
  work()
}

// --- what a person does

at('files').addEventListener('change', event => { add(event.target.files); event.target.value = '' })
at('ask').addEventListener('submit', event => event.preventDefault())
at('clear').addEventListener('click', () => {
  stop.abort()
  stop = new AbortController()
  queue = []
  Object.assign(count, {all: 0, done: 0, refused: 0})
  at('results').replaceChildren()
  at('clear').hidden = true
  at('files').focus()
  say('All removed.')
})
for (const kind of ['dragover', 'drop', 'dragleave']) {
  window.addEventListener(kind, event => {      // a file that is dropped beside the zone must not replace the page
    event.preventDefault()
    at('drop').classList.toggle('over', kind === 'dragover')
    if (kind === 'drop') add(event.dataTransfer.files)
  })
}
show_model()
