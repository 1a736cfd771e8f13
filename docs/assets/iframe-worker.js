// Search without a server: no browser starts a Worker from file://, so the search's script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const load = src => new Promise((done, failed) => {
        const script = Object.assign(this.inside.document.createElement("script"), { src, onload: done, onerror: failed })
        this.inside.document.body.append(script)
      })
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...urls) => Promise.all(urls.map(load))
      this.ready = load(String(url))
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
